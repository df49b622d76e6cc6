//! What the simulators share: seeded random numbers, and which seeds a test runs.
//!
//! A run is decided by its seed alone. `VMTWIN_SEED_BASE=n` runs other seeds than the fixed ones, `VMTWIN_SEEDS=n` that
//! many, `VMTWIN_SEED=n` one seed only, `VMTWIN_TRACE=1` prints what happens in it.
#![forbid(unsafe_code)]

/// xoshiro256** 1.0 (Blackman and Vigna, "Scrambled linear pseudorandom number generators", 2021, public domain code at
/// prng.di.unimi.it), its state filled by splitmix64 as its authors advise.
#[derive(Clone, Debug)]
pub struct Rng {
    state: [u64; 4],
}

impl Rng {
    /// The same numbers for the same seed, on every machine.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut mix = seed;
        let mut splitmix = || {
            mix = mix.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (mix ^ (mix >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        };
        Self { state: [splitmix(), splitmix(), splitmix(), splitmix()] }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A number below `limit`, which is not zero. Its bias is under 2^-32 for the limits that simulators use.
    pub fn below(&mut self, limit: u64) -> u64 {
        assert!(limit > 0, "nothing lies below zero");
        u64::try_from((u128::from(self.bits()) * u128::from(limit)) >> 64).expect("the high half of a product")
    }

    /// A number from `least` to `most`, both included.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.below(most - least + 1)
    }

    /// True in `per_mille` of 1000 cases.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// One of `all`, which is not empty.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[usize::try_from(self.below(all.len() as u64)).expect("an index fits")]
    }

    /// 128 random bits, for ids.
    pub fn id(&mut self) -> u128 {
        u128::from(self.bits()) << 64 | u128::from(self.bits())
    }

    /// A generator of its own, so that what one part draws does not shift what another gets.
    #[must_use]
    pub fn fork(&mut self) -> Self {
        Self::new(self.bits())
    }
}

fn number_from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}

/// The seeds of a test: `count` of them from the base on, or the one that `VMTWIN_SEED` names.
pub fn seeds(count: u64) -> impl Iterator<Item = u64> {
    let (first, count) = match number_from_env("VMTWIN_SEED") {
        Some(one) => (one, 1),
        None => {
            let base = number_from_env("VMTWIN_SEED_BASE").unwrap_or(1);
            (base, number_from_env("VMTWIN_SEEDS").unwrap_or(count))
        }
    };
    (0..count).map(move |nth| first.wrapping_add(nth))
}

/// Whether `VMTWIN_TRACE=1` asks for a trace.
#[must_use]
pub fn trace_wanted() -> bool {
    std::env::var("VMTWIN_TRACE").is_ok_and(|value| value == "1")
}

/// The command that runs one failed seed again, with a trace.
#[must_use]
pub fn replay_command(simulator: &str, test: &str, seed: u64) -> String {
    format!("VMTWIN_SEED={seed} VMTWIN_TRACE=1 cargo test -p vmtwin-tests --test {simulator} {test} -- --nocapture")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_gives_the_published_sequence() {
        // The first outputs of xoshiro256** with the state 1, 2, 3, 4, as the reference code prints them.
        let mut rng = Rng { state: [1, 2, 3, 4] };
        assert_eq!(
            [rng.bits(), rng.bits(), rng.bits(), rng.bits()],
            [11520, 0, 1_509_978_240, 1_215_971_899_390_074_240]
        );
    }

    #[test]
    fn numbers_stay_below_their_limit_and_reach_both_ends() {
        let mut rng = Rng::new(7);
        let mut seen = [false; 6];
        for _ in 0..1000 {
            seen[usize::try_from(rng.between(2, 5)).unwrap()] = true;
        }
        assert_eq!(seen, [false, false, true, true, true, true]);
    }
}
