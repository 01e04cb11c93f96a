"""Rollouts: one trajectory (`trajectory`), the groups of a prompt, and who may start when (`scheduler`)."""
