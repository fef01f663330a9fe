//! Reading and writing the primitive fields of binary layouts: little-endian integers, LEB128 varints, byte strings.

use super::{FormatError, Result};

/// Appends a varint: seven bits a byte, least significant first, high bit set on all but the last byte.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a signed number as a zigzag varint.
pub fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

/// Appends a byte string with its length in front.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// A cursor over stored bytes. Every method fails, naming the object and offset, where the input is too short or wrong.
#[derive(Debug)]
pub struct Reader<'a> {
    object: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Reads `bytes`, which errors call `object`.
    pub fn new(object: &'a str, bytes: &'a [u8]) -> Self {
        Self { object, bytes, at: 0 }
    }

    /// An error at the current position.
    pub fn error(&self, what: impl Into<String>) -> FormatError {
        FormatError::new(self.object, self.at as u64, what)
    }

    /// Bytes not yet read.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(self.error(format!("needs {len} bytes, has {}", self.remaining())));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A varint of at most ten bytes.
    pub fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.error("a number of more than 64 bits"))
    }

    /// A zigzag varint.
    pub fn signed(&mut self) -> Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A varint that must not exceed `max`; `what` names it in the error.
    pub fn bounded(&mut self, max: u64, what: &str) -> Result<u64> {
        let value = self.varint()?;
        if value > max {
            return Err(self.error(format!("{what} is {value}, at most {max} is allowed")));
        }
        Ok(value)
    }

    /// A count of things that take at least `each` bytes, so that a wrong count cannot ask for more memory than the
    /// input could fill.
    pub fn count(&mut self, each: usize, what: &str) -> Result<usize> {
        let max = self.remaining() / each.max(1);
        Ok(self.bounded(max as u64, what)? as usize)
    }

    /// A byte string with its length in front.
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let len = self.count(1, "length")?;
        self.take(len)
    }

    /// Fails unless everything was read.
    pub fn end(&self) -> Result<()> {
        match self.remaining() {
            0 => Ok(()),
            left => Err(self.error(format!("{left} bytes too many"))),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_come_back(value: u64, signed: i64) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            put_signed(&mut out, signed);
            let mut reader = Reader::new("test", &out);
            prop_assert_eq!(reader.varint().unwrap(), value);
            prop_assert_eq!(reader.signed().unwrap(), signed);
            prop_assert!(reader.end().is_ok());
        }
    }

    #[test]
    fn an_overlong_number_is_refused() {
        assert!(Reader::new("test", &[0xff; 11]).varint().is_err());
        assert!(Reader::new("test", &[0x80; 3]).varint().is_err());
    }

    #[test]
    fn a_count_cannot_ask_for_more_than_the_input_holds() {
        let mut out = Vec::new();
        put_varint(&mut out, 1 << 40);
        out.extend_from_slice(&[0; 4]);
        let error = Reader::new("obj", &out).count(4, "entries").unwrap_err();
        assert_eq!(error.to_string(), "obj is damaged at byte 6: entries is 1099511627776, at most 2 is allowed");
    }
}
