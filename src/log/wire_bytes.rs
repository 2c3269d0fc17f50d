//! A reader over a byte slice that never panics and never allocates more than the slice is long.

/// The error of a reader whose bytes end too early or are not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// Reads little-endian fields from the front.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    #[inline]
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self.0.split_at_checked(len).ok_or(Malformed("it ends too early"))?;
        self.0 = tail;
        Ok(head)
    }
    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(Malformed("it ends too early"))?;
        self.0 = tail;
        Ok(*head)
    }
    #[inline]
    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_le_bytes(self.array()?))
    }
    #[inline]
    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    #[inline]
    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    #[inline]
    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    pub(crate) fn bytes16(&mut self) -> Result<[u8; 16], Malformed> {
        self.array()
    }
    /// Reads text behind a one-byte length.
    pub(crate) fn text8(&mut self) -> Result<&'a str, Malformed> {
        let len = usize::from(self.u8()?);
        self.text(len)
    }
    /// Reads text behind a two-byte length.
    pub(crate) fn text16(&mut self) -> Result<&'a str, Malformed> {
        let len = usize::from(self.u16()?);
        self.text(len)
    }
    pub(crate) fn text(&mut self, len: usize) -> Result<&'a str, Malformed> {
        std::str::from_utf8(self.take(len)?).map_err(|_| Malformed("a text in it is not UTF-8"))
    }
    pub(crate) fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("bytes trail it")) }
    }
}

/// Writes text behind a one-byte length. The caller has checked that the text fits.
pub(crate) fn put_text8(out: &mut Vec<u8>, text: &str) {
    let len = u8::try_from(text.len()).expect("validated: at most 255 bytes");
    out.push(len);
    out.extend_from_slice(text.as_bytes());
}

/// Writes text behind a two-byte length. The caller has checked that the text fits.
pub(crate) fn put_text16(out: &mut Vec<u8>, text: &str) {
    let len = u16::try_from(text.len()).expect("validated: at most 65535 bytes");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}
