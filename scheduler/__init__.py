"""Decides what each step computes: requests, batching, KV blocks and their sharing. Standard library only."""
