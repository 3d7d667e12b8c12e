"""kvctl: the admin CLI of kvstored. Talks to the control socket and nothing else.

`cli` is the command line and names the rooms of commands: `reading`, `live` (top, events), `prefixes` (ls, tree, stat),
`acting` and others; `program` is what all of them share, `client` the way to the daemon, `render` the tables, `doctor`
the checks and `host` what they read.
"""
