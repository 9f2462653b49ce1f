"""Small drawn videos of a person who moves: data to try every stage on without a download (`omnivision demo-data`)."""
