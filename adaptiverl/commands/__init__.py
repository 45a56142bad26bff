"""The commands of the command line; those but `train` read what a run left in its folder."""
