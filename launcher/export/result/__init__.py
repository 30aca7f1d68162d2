"""From a plan to a folder: bytes on the disk, the files beside them, and the proof of both."""
