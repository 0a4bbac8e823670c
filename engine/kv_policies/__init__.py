"""Which of a request's tokens keep their KV: one file for each policy, see docs/kv-policies.md."""
