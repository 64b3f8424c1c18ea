"""Pretrained models in and out: safetensors folders and GGUF files; no pickle, no network."""
