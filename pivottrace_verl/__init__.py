"""PivotTrace for verl: label-efficient RLVR.

A pool of unlabelled prompts goes in; the policy's own attention says which are worth a human's
label; verl trains on the mix. Importing this package imports nothing heavy and changes nothing.
"""

__version__ = "0.1.0"
