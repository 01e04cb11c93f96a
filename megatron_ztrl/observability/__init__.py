"""What a run tells: metrics, progress on the terminal, the rollouts themselves, and the report."""
