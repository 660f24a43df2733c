"""What compression lets a store keep: request traces replayed against caches of given sizes."""
