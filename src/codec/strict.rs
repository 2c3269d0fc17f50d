//! A serializer in front of the format's own, which refuses values that the format would damage
//! without an error.
//!
//! JSON has no number for NaN and the infinities, and serde_json writes `null`. Readers treat an
//! object with a repeated field in two ways, or reject it. A field that bincode leaves out shifts
//! all later fields. Each of these is an error here, with its place in the value.
//!
//! **Invariants.** Of the value, only field names and element numbers are kept; field names are the
//! program's own. A refusal fails the whole encoding, even if a foreign `Serialize` drops the
//! error.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;

use serde::ser::{self, Serialize, Serializer};

/// The losses that a format does not report as errors.
#[derive(Debug, Clone, Copy)]
pub(super) struct Losses {
    /// NaN and the infinities.
    pub(super) non_finite: bool,
    /// The same key twice in a map.
    pub(super) repeated_keys: bool,
    /// A field that is left out.
    pub(super) skipped_fields: bool,
}

/// Why an encoding was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lossy {
    what: &'static str,
    /// The steps from the inside out.
    steps: Vec<Step>,
}

/// One step down into a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A field, or a variant.
    Name(&'static str),
    Element(usize),
    /// An entry of a map, by number, because a map's keys are the application's.
    Entry(usize),
}

impl fmt::Display for Lossy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.steps.split_last() {
            None => f.write_str("the value")?,
            Some((first, rest)) => {
                f.write_str("`")?;
                match first {
                    Step::Name(name) => f.write_str(name)?,
                    step => write!(f, "{step}")?,
                }
                rest.iter().rev().try_for_each(|step| write!(f, "{step}"))?;
                f.write_str("`")?;
            }
        }
        write!(f, " {}", self.what)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, ".{name}"),
            Self::Element(at) => write!(f, "[{at}]"),
            Self::Entry(at) => write!(f, "{{entry {at}}}"),
        }
    }
}

impl std::error::Error for Lossy {}

/// The state of one encoding.
#[derive(Debug)]
pub(super) struct Watch {
    losses: Losses,
    lossy: RefCell<Option<Lossy>>,
}

impl Watch {
    pub(super) fn new(losses: Losses) -> Self {
        Self { losses, lossy: RefCell::new(None) }
    }

    /// Wraps a value for the format's serializer.
    pub(super) fn over<'a, T: ?Sized>(&'a self, value: &'a T) -> Watched<'a, T> {
        Watched { value, watch: self }
    }

    /// Returns why the encoding was refused, if it was. `root` is the field around the value, if
    /// any.
    pub(super) fn lossy(self, root: Option<&'static str>) -> Option<Lossy> {
        let mut lossy = self.lossy.into_inner()?;
        lossy.steps.extend(root.map(Step::Name));
        Some(lossy)
    }

    #[cold]
    fn refuse<E: ser::Error>(&self, what: &'static str) -> E {
        self.lossy.borrow_mut().get_or_insert(Lossy { what, steps: Vec::new() });
        E::custom(what)
    }

    #[cold]
    fn step(&self, step: Step) {
        if let Some(lossy) = &mut *self.lossy.borrow_mut() {
            lossy.steps.push(step);
        }
    }

    fn check_float<E: ser::Error>(&self, value: f64) -> Result<(), E> {
        if value.is_finite() || !self.losses.non_finite {
            return Ok(());
        }
        Err(self.refuse(match value {
            f64::INFINITY => "is infinite, and the format has no number for it",
            f64::NEG_INFINITY => "is negative infinity, and the format has no number for it",
            _ => "is NaN, and the format has no number for it",
        }))
    }
}

/// A value under watch.
#[derive(Debug)]
pub(super) struct Watched<'a, T: ?Sized> {
    value: &'a T,
    watch: &'a Watch,
}

impl<T: Serialize + ?Sized> Serialize for Watched<'_, T> {
    #[inline]
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.value.serialize(Strict { inner: serializer, watch: self.watch })
    }
}

struct Strict<'a, S> {
    inner: S,
    watch: &'a Watch,
}

impl<'a, S> Strict<'a, S> {
    fn parts<C>(watch: &'a Watch, inner: C, variant: Option<&'static str>) -> Parts<'a, C> {
        Parts { inner, watch, at: 0, variant, keys: None }
    }
}

/// A sequence, a map or a structure while it is being written.
struct Parts<'a, C> {
    inner: C,
    watch: &'a Watch,
    /// The number of the next element or entry.
    at: usize,
    variant: Option<&'static str>,
    /// The keys so far, if they may repeat.
    keys: Option<BTreeSet<Vec<u8>>>,
}

impl<C> Parts<'_, C> {
    /// Notes the place of an error.
    #[inline]
    fn placed<T, E>(&self, step: Step, result: Result<T, E>) -> Result<T, E> {
        if result.is_err() {
            self.watch.step(step);
            if let Some(variant) = self.variant {
                self.watch.step(Step::Name(variant));
            }
        }
        result
    }

    fn check_key<K: Serialize + ?Sized, E: ser::Error>(&mut self, key: &K) -> Result<(), E> {
        let Some(keys) = &mut self.keys else { return Ok(()) };
        if keys.insert(super::key_bytes(key).map_err(E::custom)?) {
            return Ok(());
        }
        let refused = Err(self.watch.refuse("has the key of an earlier entry"));
        self.placed(Step::Entry(self.at), refused)
    }
}

macro_rules! forward {
    ($($method:ident($type:ty);)*) => {
        $(
            #[inline]
            fn $method(self, value: $type) -> Result<S::Ok, S::Error> {
                self.inner.$method(value)
            }
        )*
    };
}

impl<'a, S: Serializer> Serializer for Strict<'a, S> {
    type Ok = S::Ok;
    type Error = S::Error;
    type SerializeSeq = Parts<'a, S::SerializeSeq>;
    type SerializeTuple = Parts<'a, S::SerializeTuple>;
    type SerializeTupleStruct = Parts<'a, S::SerializeTupleStruct>;
    type SerializeTupleVariant = Parts<'a, S::SerializeTupleVariant>;
    type SerializeMap = Parts<'a, S::SerializeMap>;
    type SerializeStruct = Parts<'a, S::SerializeStruct>;
    type SerializeStructVariant = Parts<'a, S::SerializeStructVariant>;

    forward! {
        serialize_bool(bool);
        serialize_i8(i8);
        serialize_i16(i16);
        serialize_i32(i32);
        serialize_i64(i64);
        serialize_i128(i128);
        serialize_u8(u8);
        serialize_u16(u16);
        serialize_u32(u32);
        serialize_u64(u64);
        serialize_u128(u128);
        serialize_char(char);
        serialize_str(&str);
        serialize_bytes(&[u8]);
        serialize_unit_struct(&'static str);
    }

    #[inline]
    fn serialize_f32(self, value: f32) -> Result<S::Ok, S::Error> {
        self.watch.check_float(f64::from(value))?;
        self.inner.serialize_f32(value)
    }

    #[inline]
    fn serialize_f64(self, value: f64) -> Result<S::Ok, S::Error> {
        self.watch.check_float(value)?;
        self.inner.serialize_f64(value)
    }

    #[inline]
    fn serialize_none(self) -> Result<S::Ok, S::Error> {
        self.inner.serialize_none()
    }

    #[inline]
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.inner.serialize_some(&self.watch.over(value))
    }

    #[inline]
    fn serialize_unit(self) -> Result<S::Ok, S::Error> {
        self.inner.serialize_unit()
    }

    #[inline]
    fn serialize_unit_variant(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
    ) -> Result<S::Ok, S::Error> {
        self.inner.serialize_unit_variant(name, index, variant)
    }

    #[inline]
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        self.inner.serialize_newtype_struct(name, &self.watch.over(value))
    }

    #[inline]
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        let result = self.inner.serialize_newtype_variant(name, index, variant, &self.watch.over(value));
        if result.is_err() {
            self.watch.step(Step::Name(variant));
        }
        result
    }

    #[inline]
    fn serialize_seq(self, len: Option<usize>) -> Result<Self::SerializeSeq, S::Error> {
        Ok(Self::parts(self.watch, self.inner.serialize_seq(len)?, None))
    }

    #[inline]
    fn serialize_tuple(self, len: usize) -> Result<Self::SerializeTuple, S::Error> {
        Ok(Self::parts(self.watch, self.inner.serialize_tuple(len)?, None))
    }

    #[inline]
    fn serialize_tuple_struct(
        self,
        name: &'static str,
        len: usize,
    ) -> Result<Self::SerializeTupleStruct, S::Error> {
        Ok(Self::parts(self.watch, self.inner.serialize_tuple_struct(name, len)?, None))
    }

    #[inline]
    fn serialize_tuple_variant(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        len: usize,
    ) -> Result<Self::SerializeTupleVariant, S::Error> {
        let inner = self.inner.serialize_tuple_variant(name, index, variant, len)?;
        Ok(Self::parts(self.watch, inner, Some(variant)))
    }

    #[inline]
    fn serialize_map(self, len: Option<usize>) -> Result<Self::SerializeMap, S::Error> {
        let mut parts = Self::parts(self.watch, self.inner.serialize_map(len)?, None);
        // A map of known length is one in memory, whose keys differ. A map of unknown length may be
        // a structure into which another structure is flattened.
        parts.keys = (len.is_none() && self.watch.losses.repeated_keys).then(BTreeSet::new);
        Ok(parts)
    }

    #[inline]
    fn serialize_struct(self, name: &'static str, len: usize) -> Result<Self::SerializeStruct, S::Error> {
        Ok(Self::parts(self.watch, self.inner.serialize_struct(name, len)?, None))
    }

    #[inline]
    fn serialize_struct_variant(
        self,
        name: &'static str,
        index: u32,
        variant: &'static str,
        len: usize,
    ) -> Result<Self::SerializeStructVariant, S::Error> {
        let inner = self.inner.serialize_struct_variant(name, index, variant, len)?;
        Ok(Self::parts(self.watch, inner, Some(variant)))
    }

    #[inline]
    fn collect_str<T: fmt::Display + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.inner.collect_str(value)
    }

    #[inline]
    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

macro_rules! elements {
    ($($trait:ident::$method:ident;)*) => {
        $(
            impl<C: ser::$trait> ser::$trait for Parts<'_, C> {
                type Ok = C::Ok;
                type Error = C::Error;

                #[inline]
                fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), C::Error> {
                    let result = self.inner.$method(&self.watch.over(value));
                    self.at += 1;
                    self.placed(Step::Element(self.at - 1), result)
                }

                #[inline]
                fn end(self) -> Result<C::Ok, C::Error> {
                    self.inner.end()
                }
            }
        )*
    };
}

elements! {
    SerializeSeq::serialize_element;
    SerializeTuple::serialize_element;
    SerializeTupleStruct::serialize_field;
    SerializeTupleVariant::serialize_field;
}

macro_rules! fields {
    ($($trait:ident;)*) => {
        $(
            impl<C: ser::$trait> ser::$trait for Parts<'_, C> {
                type Ok = C::Ok;
                type Error = C::Error;

                #[inline]
                fn serialize_field<T: Serialize + ?Sized>(
                    &mut self,
                    name: &'static str,
                    value: &T,
                ) -> Result<(), C::Error> {
                    let result = self.inner.serialize_field(name, &self.watch.over(value));
                    self.placed(Step::Name(name), result)
                }

                #[inline]
                fn skip_field(&mut self, name: &'static str) -> Result<(), C::Error> {
                    if self.watch.losses.skipped_fields {
                        let refused = self.watch.refuse("is left out, and the format cannot say so");
                        return self.placed(Step::Name(name), Err(refused));
                    }
                    self.inner.skip_field(name)
                }

                #[inline]
                fn end(self) -> Result<C::Ok, C::Error> {
                    self.inner.end()
                }
            }
        )*
    };
}

fields! {
    SerializeStruct;
    SerializeStructVariant;
}

impl<C: ser::SerializeMap> ser::SerializeMap for Parts<'_, C> {
    type Ok = C::Ok;
    type Error = C::Error;

    #[inline]
    fn serialize_key<K: Serialize + ?Sized>(&mut self, key: &K) -> Result<(), C::Error> {
        self.check_key(key)?;
        let result = self.inner.serialize_key(&self.watch.over(key));
        self.placed(Step::Entry(self.at), result)
    }

    #[inline]
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), C::Error> {
        let result = self.inner.serialize_value(&self.watch.over(value));
        self.at += 1;
        self.placed(Step::Entry(self.at - 1), result)
    }

    #[inline]
    fn serialize_entry<K: Serialize + ?Sized, T: Serialize + ?Sized>(
        &mut self,
        key: &K,
        value: &T,
    ) -> Result<(), C::Error> {
        self.check_key(key)?;
        let result = self.inner.serialize_entry(&self.watch.over(key), &self.watch.over(value));
        self.at += 1;
        self.placed(Step::Entry(self.at - 1), result)
    }

    #[inline]
    fn end(self) -> Result<C::Ok, C::Error> {
        self.inner.end()
    }
}
