"""What every script shares and no method needs: errors, files, devices, seeds, run directories, pictures."""
