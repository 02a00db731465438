"""What goes to the board as it is. These files need Python and nothing else there; build.sh does without Python, too."""
