"""What each target refuses, and the passes that write it in words the target takes."""
