"""`omnivision report`: runs on one HTML page that needs no network."""
