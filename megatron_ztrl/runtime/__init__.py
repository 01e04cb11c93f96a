"""Processes: Ray places, starts and stops them, on one machine or on a cluster. All of Ray is behind this."""
