"""Runs models: async engine, model runner, models, KV cache storage, sampling, weights."""
