"""kvctl: the admin CLI of kvstored. Talks to the control socket and nothing else.

`cli` holds the commands, `client` the way to the daemon, `render` the tables, `doctor` the checks and `host` what
they read.
"""
