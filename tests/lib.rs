//! Helpers that the simulators share: the seeded random numbers.
