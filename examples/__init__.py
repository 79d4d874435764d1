"""Real workflows: one file each, all served by `streamjobs dev examples.app:app`."""
