"""The commands besides `train`, one file each."""
