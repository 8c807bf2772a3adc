"""`pybn bench`: pybn against a memory copy and against everyone else who does batch norm on the CPU.

Read in this order; each file uses only those above it:

- ``cases``    what is measured: shapes, operations, and the memory traffic that each cannot avoid
- ``problem``  the data that all contenders are given, what a contender is, and whether two agree
- ``ours``     pybn's contenders, and the copy that is the unit
- ``peers``    everyone else's, one file each
- ``measure``  how contenders are timed: interleaved, from the same state
- ``results``  the times of a run, what is derived from them, and its JSON
- ``session``  a whole run: peers, problems, cases, in this order
- ``targets``  what pybn promises of these figures
- ``tables``   the figures in tables, marked where they miss a target
- ``report``   tables on a terminal or in Markdown
- ``plot``     the picture: every time against its traffic bound
- ``compare``  a run against an earlier one

Nothing of it is imported by ``import pybn``.
"""
