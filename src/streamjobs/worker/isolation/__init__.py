"""Isolated tools: each call in a process of its own, that can be ended whatever it does.

    worker ── fork server ── supervisor, one a call ── the tool's process ── whatever that starts

The fork server imports the modules of isolated tools once, in an environment without secrets, and forks; it
runs no tool and sees no arguments. A supervisor ends its tool, and all that came of it, at the timeout, and
when the worker hangs up: on cancel, or by its death. Tools are forked from what never held a secret.

Rejected: a new interpreter for each call, 0.35 s of processor time where a fork takes 0.01 s; forking the
worker itself, whose memory holds other jobs; `multiprocessing`'s fork server, which gives the child the
worker's environment and pickles what it sends, and what it reads.
"""
