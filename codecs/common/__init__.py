"""What several codecs build on."""
