//! A bounded little-endian cursor: every decoder of the project reads outside bytes through it.

/// Why bytes were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the fields need.
    #[error("cut short: {wanted} more bytes needed at byte {at}")]
    Short {
        /// Where reading stopped.
        at: usize,
        /// What was still needed.
        wanted: usize,
    },
    /// Bytes left after the last field.
    #[error("{left} bytes too many at the end")]
    Long {
        /// How many.
        left: usize,
    },
    /// A list, text or payload beyond its bound.
    #[error("a length of {found} where at most {most} is allowed")]
    Length {
        /// As read.
        found: u64,
        /// Its bound.
        most: u64,
    },
    /// Another version of a format.
    #[error("{what} of version {found}; this program knows version {known}. Upgrade the older side")]
    Version {
        /// Which format.
        what: &'static str,
        /// As read.
        found: u64,
        /// Ours.
        known: u64,
    },
    /// A checksum that does not fit the bytes.
    #[error("checksum of the {what} does not match: damaged")]
    Checksum {
        /// Which part.
        what: &'static str,
    },
    /// A value that its type does not have.
    #[error("the {what} makes no sense")]
    Bad {
        /// Which part.
        what: &'static str,
    },
}

/// Reads fields off a slice.
#[derive(Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

macro_rules! read_int {
    ($($name:ident $type:ty),*) => {$(
        #[doc = concat!("A little-endian `", stringify!($type), "`.\n\n# Errors\n`Short` at the end of the bytes.")]
        pub fn $name(&mut self) -> Result<$type, DecodeError> {
            let raw = self.bytes(size_of::<$type>())?;
            Ok(<$type>::from_le_bytes(raw.try_into().expect("just this many were taken")))
        }
    )*};
}

impl<'a> Reader<'a> {
    /// Begins at the first byte.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }
    read_int!(u8 u8, u16 u16, u32 u32, u64 u64, u128 u128, i64 i64);

    /// A boolean: 0 or 1 and nothing else.
    ///
    /// # Errors
    /// `Bad` for any other byte.
    pub fn bool(&mut self) -> Result<bool, DecodeError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Bad { what: "yes-or-no byte" }),
        }
    }
    /// The next `count` bytes.
    ///
    /// # Errors
    /// `Short` where there are fewer.
    pub fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let left = self.bytes.len() - self.at;
        if count > left {
            return Err(DecodeError::Short { at: self.at, wanted: count - left });
        }
        let taken = &self.bytes[self.at..self.at + count];
        self.at += count;
        Ok(taken)
    }
    /// A u32 length, at most `most`, and that many bytes.
    ///
    /// # Errors
    /// `Length` beyond the bound, `Short` at the end.
    pub fn blob(&mut self, most: usize) -> Result<&'a [u8], DecodeError> {
        let count = self.u32()? as usize;
        if count > most {
            return Err(DecodeError::Length { found: count as u64, most: most as u64 });
        }
        self.bytes(count)
    }
    /// A blob that is UTF-8.
    ///
    /// # Errors
    /// As `blob`, and `Bad` where it is no UTF-8.
    pub fn text(&mut self, most: usize) -> Result<&'a str, DecodeError> {
        std::str::from_utf8(self.blob(most)?).map_err(|_| DecodeError::Bad { what: "text" })
    }
    /// A u32 count, at most `most`, and that many elements.
    ///
    /// # Errors
    /// `Length` beyond the bound, or the element's own error.
    pub fn list<T>(
        &mut self,
        most: usize,
        mut element: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let count = self.u32()? as usize;
        if count > most {
            return Err(DecodeError::Length { found: count as u64, most: most as u64 });
        }
        // Never more room up front than the bytes could fill: a count is a claim, not a fact.
        let mut all = Vec::with_capacity(count.min(self.left()));
        for _ in 0..count {
            all.push(element(self)?);
        }
        Ok(all)
    }
    /// A yes-or-no byte and, if yes, the element.
    ///
    /// # Errors
    /// As its parts.
    pub fn option<T>(
        &mut self,
        element: impl FnOnce(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, DecodeError> {
        if self.bool()? { element(self).map(Some) } else { Ok(None) }
    }
    /// Bytes not read yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }
    /// Asserts that all was read.
    ///
    /// # Errors
    /// `Long` where bytes are left.
    pub fn end(&self) -> Result<(), DecodeError> {
        if self.left() == 0 { Ok(()) } else { Err(DecodeError::Long { left: self.left() }) }
    }
}

/// Appends fields to a vector.
#[derive(Debug)]
pub struct Writer<'a> {
    out: &'a mut Vec<u8>,
}

macro_rules! write_int {
    ($($name:ident $type:ty),*) => {$(
        #[doc = concat!("A little-endian `", stringify!($type), "`.")]
        pub fn $name(&mut self, value: $type) {
            self.out.extend_from_slice(&value.to_le_bytes());
        }
    )*};
}

impl<'a> Writer<'a> {
    /// Appends to `out`.
    #[must_use]
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self { out }
    }
    write_int!(u8 u8, u16 u16, u32 u32, u64 u64, u128 u128, i64 i64);

    /// 0 or 1.
    pub fn bool(&mut self, value: bool) {
        self.u8(u8::from(value));
    }
    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }
    /// A u32 length and the bytes.
    pub fn blob(&mut self, bytes: &[u8]) {
        self.u32(u32::try_from(bytes.len()).expect("what we send is bounded far below 4 GiB"));
        self.bytes(bytes);
    }
    /// A text as a blob.
    pub fn text(&mut self, text: &str) {
        self.blob(text.as_bytes());
    }
    /// A u32 count and the elements.
    pub fn list<T>(&mut self, all: &[T], mut element: impl FnMut(&mut Self, &T)) {
        self.u32(u32::try_from(all.len()).expect("what we send is bounded far below 4 Gi"));
        for one in all {
            element(self, one);
        }
    }
    /// A yes-or-no byte and the element.
    pub fn option<T>(&mut self, value: Option<&T>, element: impl FnOnce(&mut Self, &T)) {
        self.bool(value.is_some());
        if let Some(value) = value {
            element(self, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absurd_count_is_refused_before_room_is_made_for_it() {
        let bytes = u32::MAX.to_le_bytes();
        let found = Reader::new(&bytes).list(10, |r| r.u8());
        assert_eq!(found, Err(DecodeError::Length { found: u64::from(u32::MAX), most: 10 }));
        let found = Reader::new(&[9, 0, 0, 0, 1]).blob(100);
        assert_eq!(found, Err(DecodeError::Short { at: 4, wanted: 8 }));
    }
}
