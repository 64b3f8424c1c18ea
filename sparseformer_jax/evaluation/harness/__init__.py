"""A checkpoint under lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness)."""
