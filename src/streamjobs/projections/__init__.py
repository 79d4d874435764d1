"""Projections: readers that fold the logs of jobs into something that can be asked for at once."""
