"""Workers: they take jobs, run them, and record every fact."""
