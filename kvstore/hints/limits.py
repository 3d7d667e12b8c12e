"""Every bound on hints, each with its arithmetic. All are of one tenant unless the name says otherwise."""

from typing import Final

SECOND_NS: Final = 10**9
HOUR_S: Final = 3600

# Names of programs, tools, steps, workflows, runs and sources. 128 characters hold a UUID, a slash and a label.
NAME_CHARS: Final = 128

# Programs: as many as an engine host serves at once, times ten. About 1 KiB each with its name: 4 MiB.
PROGRAMS: Final = 4096
PROGRAM_TTL_S: Final = HOUR_S  # silent for so long: over
TTL_S_MAX: Final = 24 * HOUR_S  # of a program or a run that asks for more patience
EXPECTED_S_MAX: Final = 7 * 24 * HOUR_S  # what is announced for later than that is no forecast

# Pins around a tool call. A caller's estimate is trusted fourfold; a pin shorter than a minute is not worth its
# bookkeeping, and one longer than an hour is a leak.
ESTIMATE_FACTOR: Final = 4
PIN_NS_MIN: Final = 60 * SECOND_NS
PIN_NS_MAX: Final = HOUR_S * SECOND_NS

# Tools whose gaps are remembered: 256 rows of 177 four-byte counts and a row for all are 182 KB, 12 MB for 64 tenants.
TOOLS: Final = 256

# Blocks that hints may name, each counted once however many chains share it: as many as 64 GiB hold of 1 MiB. One
# takes a key of 32 bytes, a number of 36, a slot in a table of about 100 and a place in a list, 180 bytes
# in all: 12 MB. The longest chain, 1,000,000 tokens in blocks of 16, has 62,500.
CHAIN_BLOCKS: Final = 1 << 16
HINTED_BLOCKS: Final = 1 << 16

# Ends: chains that programs and steps are bound to, 512 runs of 8 steps and 4,096 programs. An update walks at worst
# chains that all of them cut into pieces: 8,192 pieces of 1.5 us are 12 ms, which go in slices (values.py).
CHAIN_ENDS: Final = 8192

# Workflows. A description of 256 steps with names of 32 characters and two edges each takes 40 KB, so it fits a frame.
# It has a comma between any two of steps, of their five fields, edges and chances: 3,400, and some in names.
# Steps to execution of 256 steps and 1,024 edges take about 60 us, and twice that on a busy core.
WORKFLOWS: Final = 64
WORKFLOW_TTL_S: Final = 24 * HOUR_S  # unused for so long: forgotten
GRAPH_STEPS: Final = 256
GRAPH_EDGES: Final = 1024
GRAPH_TEXT_BYTES: Final = 64 << 10
GRAPH_COMMAS: Final = 4096
RUNS: Final = 1024  # 2 KB of steps each: 2 MB
RUN_TTL_S: Final = HOUR_S
SOON_CHAINS: Final = 64  # named for prefetch in one answer,
SOON_BLOCKS: Final = CHAIN_BLOCKS  # of no more blocks than this: 2 MB of keys

# What follows from a run goes chain by chain, a tick each: 1,024 blocks of 0.3 us. Of runs that are over the chains
# wait with their keys: 1 MB. What does not fit is not said; it is advice.
ENDED_BLOCKS: Final = 1 << 15
DUE_AT_ONCE: Final = 4  # programs and runs whose time is up in one tick: to unpin takes 0.1 ms
AGAIN_AT_ONCE: Final = 2  # pins that are tried again in one tick: 0.3 ms
DROPS_AT_ONCE: Final = 6  # programs that lose their pins in one frame, for one that came before them

# Reports: about 1 us a program and 0.1 us a step, so that no answer holds up a frame for a millisecond.
PROGRAMS_LISTED: Final = 512
WORKFLOWS_LISTED: Final = 256
STEPS_LISTED: Final = 8192  # of runs, together
STEPS_SHOWN: Final = 8  # of a run, that run or come next

# A tenant without a session for so long: nothing is left but what its tools have taught.
ABSENT_S: Final = HOUR_S
LOOK_S: Final = 60  # how often to see whether it has one
