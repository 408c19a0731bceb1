"""Training: the shared loop with its schedule and tracking, batches of images, and the plain classifier."""
