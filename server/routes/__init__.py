"""The routes, split by room: each module has one `router`."""
