//! The macros that say each layout once for both languages, and the C header.

use core::fmt;

use crate::{mapping, packets, policy, redirect, sockmap};

/// How a Rust type is written in C.
pub(crate) trait CType {
    const NAME: &'static str;
    /// `[n]` for arrays.
    const ELEMENTS: Option<usize> = None;
}

macro_rules! c_types {
    ($($rust:ty => $c:literal),+) => { $(impl CType for $rust { const NAME: &'static str = $c; })+ };
}
c_types!(u8 => "__u8", u16 => "__u16", u32 => "__u32", u64 => "__u64");

/// The kernel's, of whom the C header has it: whoever reads a value by a system call finds a zero there.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct SpinLock(u32);

impl CType for SpinLock {
    const NAME: &'static str = "struct bpf_spin_lock";
}

impl<T: CType, const N: usize> CType for [T; N] {
    const NAME: &'static str = T::NAME;
    const ELEMENTS: Option<usize> = Some(N);
}

pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) c_type: &'static str,
    pub(crate) elements: Option<usize>,
    pub(crate) offset: usize,
}

pub(crate) struct Layout {
    pub(crate) name: &'static str,
    pub(crate) size: usize,
    pub(crate) fields: &'static [Field],
}

/// `repr(C)` structures without padding, their C twins, and `aya::Pod`.
macro_rules! layouts {
    ($(
        $(#[doc = $doc:literal])+
        pub struct $name:ident as $c:literal {
            $($(#[doc = $field_doc:literal])+ $field:ident: $type:ty,)+
        }
    )+) => {
        $(
            $(#[doc = $doc])+
            #[repr(C)]
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
            pub struct $name { $($(#[doc = $field_doc])+ pub $field: $type,)+ }

            const _: () = assert!(
                size_of::<$name>() == 0 $(+ size_of::<$type>())+,
                "padding would reach the kernel uninitialised",
            );

            impl $crate::layout::CType for $name {
                const NAME: &'static str = concat!("struct ", $c);
            }

            #[cfg(feature = "loader")]
            #[expect(unsafe_code, reason = "aya copies map keys and values as bytes")]
            // SAFETY: `repr(C)`, no padding (asserted above), and integers all the way down: every
            // bit pattern is a valid value.
            unsafe impl aya::Pod for $name {}
        )+

        pub(crate) const LAYOUTS: &[$crate::layout::Layout] = &[$($crate::layout::Layout {
            name: <$name as $crate::layout::CType>::NAME,
            size: size_of::<$name>(),
            fields: &[$($crate::layout::Field {
                name: stringify!($field),
                c_type: <$type as $crate::layout::CType>::NAME,
                elements: <$type as $crate::layout::CType>::ELEMENTS,
                offset: core::mem::offset_of!($name, $field),
            }),+],
        }),+];
    };
}

/// Named numbers, in both languages.
macro_rules! limits {
    ($($(#[doc = $doc:literal])+ $name:ident = $value:literal;)+) => {
        $($(#[doc = $doc])+ pub const $name: u32 = $value;)+
        pub(crate) const LIMITS: &[(&str, u32)] = &[$((stringify!($name), $name)),+];
    };
}

/// What the programs count, each on its own CPU.
macro_rules! counters {
    (# $($rest:tt)+) => { $crate::layout::counters! { Counter { # $($rest)+ } } };
    ($enum:ident { $($(#[doc = $doc:literal])+ $name:ident = $text:literal,)+ }) => {
        /// What the programs count: the index into their per-CPU array.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum $enum { $($(#[doc = $doc])+ $name,)+ }

        impl $enum {
            /// Every counter, in the order of the array.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// For metrics.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }
        }
    };
}

pub(crate) use {counters, layouts, limits};

/// Prints the header for the C side.
#[derive(Debug, Clone, Copy)]
pub struct CHeader;

impl fmt::Display for CHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "/* Printed from the crate ebpf-abi: change it there. */")?;
        writeln!(
            f,
            "#pragma once\n#include <linux/bpf.h>\n#include <linux/types.h>\n#include <stddef.h>\n"
        )?;
        let limits = crate::LIMITS.iter().chain(packets::LIMITS);
        let limits = limits.chain(redirect::LIMITS).chain(policy::LIMITS);
        for (name, value) in limits.chain(mapping::LIMITS).chain(sockmap::LIMITS) {
            writeln!(f, "#define {name} {value}u")?;
        }
        writeln!(f, "\nenum counter {{")?;
        for counter in crate::Counter::ALL {
            writeln!(f, "    COUNT_{},", counter.as_str())?;
        }
        writeln!(f, "    COUNTERS_MAX,\n}};\n\nenum packet_counter {{")?;
        for counter in crate::PacketCounter::ALL {
            writeln!(f, "    PACKET_{},", counter.as_str())?;
        }
        writeln!(
            f,
            "    PACKET_COUNTERS_MAX,\n}};\n\nenum redirect_counter {{"
        )?;
        for counter in crate::RedirectCounter::ALL {
            writeln!(f, "    REDIRECT_{},", counter.as_str())?;
        }
        writeln!(
            f,
            "    REDIRECT_COUNTERS_MAX,\n}};\n\nenum policy_counter {{"
        )?;
        for counter in crate::PolicyCounter::ALL {
            writeln!(f, "    POLICY_{},", counter.as_str())?;
        }
        writeln!(
            f,
            "    POLICY_COUNTERS_MAX,\n}};\n\nenum mapping_counter {{"
        )?;
        for counter in crate::MappingCounter::ALL {
            writeln!(f, "    MAPPING_{},", counter.as_str())?;
        }
        writeln!(f, "    MAPPING_COUNTERS_MAX,\n}};")?;
        let layouts = crate::LAYOUTS.iter().chain(packets::LAYOUTS);
        let layouts = layouts.chain(redirect::LAYOUTS).chain(policy::LAYOUTS);
        let mut layouts = layouts.chain(mapping::LAYOUTS).chain(sockmap::LAYOUTS);
        layouts.try_for_each(|layout| write_layout(f, layout))
    }
}

fn write_layout(f: &mut fmt::Formatter<'_>, layout: &Layout) -> fmt::Result {
    let Layout { name, size, fields } = layout;
    writeln!(f, "\n{name} {{")?;
    for field in *fields {
        write!(f, "    {} {}", field.c_type, field.name)?;
        if let Some(elements) = field.elements {
            write!(f, "[{elements}]")?;
        }
        writeln!(f, ";")?;
    }
    writeln!(
        f,
        "}};\n_Static_assert(sizeof({name}) == {size}, \"{name}: size\");"
    )?;
    for Field {
        name: field,
        offset,
        ..
    } in *fields
    {
        let says = format_args!("\"{name}.{field}: offset\"");
        writeln!(
            f,
            "_Static_assert(offsetof({name}, {field}) == {offset}, {says});"
        )?;
    }
    Ok(())
}
