"""Weights between Megatron, Hugging Face files and the engines.

``hf_mapping`` says what corresponds to what and imports nothing heavy; ``hf_checkpoint`` reads and writes files.
"""
