"""What a person asks for beside training, one file each."""
