"""`python -m bench load`: 64 clients of 8 tenants at once, killed again and again, on a drive that fails.

command.py   what is asked for, what is shown, the record
run.py       warm up, load, look: one daemon under all of it
crowd.py     processes of clients: started, killed, stopped; who hangs
client.py    one client: what it asks for, and every byte compared
board.py     what clients have done and what they are doing, in memory that outlives them
faults.py    what is wrong with a drive, from outside the daemon
victim.py    the daemon, with such a drive, and with an audit of its tables
levels.py    what a daemon has open, holds and uses
"""
