"""The HTTP side: submissions, views, and live streams of events."""
