"""Times kernels beside what a user would pick instead: python -m pallas_kernels.bench."""
