"""The systems that run beside streamjobs: each as its users would run it, tuned as well as we could."""
