// SPDX-License-Identifier: BSD-3-Clause
//! Another module of our name, or the same one twice.
//!
//! Upstream's own module is called "rdma" as well, as is the connection type: a server takes
//! one of them and ends at the second. Which it was, and which line of which file brought it,
//! is looked for here, since the server does not say.

use crate::host::symbols::own_file;
use redis_module::{Context, RedisValue, raw};
use std::ffi::{CStr, CString, OsStr, c_int};
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Includes within includes that are followed; the server itself knows no limit.
const DEEPEST: usize = 8;

/// Why we can't be loaded: somebody has the name.
///
/// # Safety
/// `ctx` is the context of a load, with a module of some name.
pub unsafe fn why_taken(ctx: *mut raw::RedisModuleCtx) -> String {
    let context = Context::new(ctx);
    let Some(holder) = holder(&context) else {
        return String::from("another module is loaded under the name \"rdma\"");
    };
    let lines = load_lines(&context);
    let brought: Vec<_> = lines.iter().filter(|line| is_same(&line.module, &holder)).collect();
    let own = own_file();
    if own.as_deref().is_some_and(|own| is_same(own, &holder)) {
        return format!("it is loaded already: remove one of {}", listed(&brought));
    }
    format!(
        "the module {} is loaded under the name \"rdma\", and a server has room for one: remove {}",
        holder.display(),
        listed(&brought)
    )
}

/// What in the configuration will end the server when it comes to it, if it is what it looks
/// like: after us, whoever has our name can't be loaded.
///
/// # Safety
/// `ctx` is the context of a load, with a module of some name.
pub unsafe fn followers(ctx: *mut raw::RedisModuleCtx) -> Vec<String> {
    let context = Context::new(ctx);
    let Some(own) = own_file() else { return Vec::new() };
    let lines = load_lines(&context);
    let (own, others): (Vec<_>, Vec<_>) =
        lines.iter().partition(|line| is_same(&line.module, &own));
    let namesakes = others.into_iter().filter(|line| {
        let name = line.module.file_name().map(OsStr::as_bytes).unwrap_or_default();
        name.windows(4).any(|part| part.eq_ignore_ascii_case(b"rdma"))
    });
    let namesakes = namesakes.map(|line| {
        format!(
            "{line} loads {} too: if that is another module of the name \"rdma\", the server ends \
             there with \"initialization failed\", and that line or ours has to go",
            line.module.display()
        )
    });
    let again = own.into_iter().skip(1);
    let again = again.map(|line| format!("{line} loads this module again: the server ends there"));
    again.chain(namesakes).collect()
}

/// The file of the module that has our name.
fn holder(context: &Context) -> Option<PathBuf> {
    let RedisValue::Array(modules) = context.call("MODULE", &["LIST"]).ok()? else { return None };
    modules.iter().find_map(|module| {
        let field = |name: &str| -> Option<String> {
            let RedisValue::Array(fields) = module else { return None };
            let at = fields.iter().position(|field| text(field).as_deref() == Some(name))?;
            fields.get(at + 1).and_then(text)
        };
        (field("name")? == "rdma").then(|| field("path").map(PathBuf::from))?
    })
}

fn text(value: &RedisValue) -> Option<String> {
    match value {
        RedisValue::SimpleString(text) | RedisValue::BulkString(text) => Some(text.clone()),
        RedisValue::StringBuffer(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        RedisValue::SimpleStringStatic(text) => Some((*text).to_owned()),
        _ => None,
    }
}

/// Whether both paths lead to one file. (Not by `fs::canonicalize`, which frees what libc has
/// allocated: that ends a server which brings another allocator along.)
fn is_same(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino())).ok();
    one == other || file(one).is_some_and(|it| file(other) == Some(it))
}

fn listed(lines: &[&LoadLine]) -> String {
    match lines {
        [] => String::from(
            "its `loadmodule`, which is not in the configuration file: on the command line?",
        ),
        lines => lines.iter().map(|line| format!("{line}")).collect::<Vec<_>>().join(", or of "),
    }
}

/// A `loadmodule` of the configuration.
#[derive(Debug, PartialEq)]
struct LoadLine {
    module: PathBuf,
    place: Place,
    /// The lines that included it, the innermost first.
    included: Vec<Place>,
}

#[derive(Clone, Debug, PartialEq)]
struct Place {
    file: PathBuf,
    line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {} of {}", self.line, self.file.display())
    }
}

impl fmt::Display for LoadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.place)?;
        self.included.iter().try_for_each(|place| write!(f, ", included by {place}"))
    }
}

/// Every `loadmodule` of the server's configuration file and what that includes.
fn load_lines(context: &Context) -> Vec<LoadLine> {
    let info = context.call("INFO", &["server"]).ok().as_ref().and_then(text).unwrap_or_default();
    let file = info.lines().find_map(|line| line.strip_prefix("config_file:")).unwrap_or_default();
    let mut lines = Vec::new();
    if !file.is_empty() {
        read(Path::new(file), &[], &mut lines);
    }
    lines
}

fn read(file: &Path, included: &[Place], lines: &mut Vec<LoadLine>) {
    let Ok(text) = fs::read(file) else { return };
    for (index, line) in String::from_utf8_lossy(&text).lines().enumerate() {
        let mut words = line.split_ascii_whitespace();
        let (Some(name), Some(value)) = (words.next(), words.next()) else { continue };
        let value = value.trim_matches(['"', '\'']);
        let place = Place { file: file.to_owned(), line: index + 1 };
        match name.to_ascii_lowercase().as_str() {
            "loadmodule" => lines.push(LoadLine {
                module: PathBuf::from(value),
                place,
                included: included.to_vec(),
            }),
            "include" if included.len() < DEEPEST => {
                let included: Vec<_> = [place].iter().chain(included).cloned().collect();
                for file in matching(value) {
                    read(&file, &included, lines);
                }
            }
            _ => {}
        }
    }
}

/// The files that an `include` names, which may be a pattern.
fn matching(pattern: &str) -> Vec<PathBuf> {
    let Ok(pattern) = CString::new(pattern) else { return Vec::new() };
    // SAFETY: plain numbers and pointers, where zeroes are valid.
    let mut found: libc::glob_t = unsafe { std::mem::zeroed() };
    // SAFETY: a C string, no callback, a place for the answer, which is freed when it was
    // copied.
    unsafe {
        let failed: c_int = libc::glob(pattern.as_ptr(), libc::GLOB_NOCHECK, None, &mut found);
        let count = if failed == 0 { found.gl_pathc as usize } else { 0 };
        let paths = (0..count).map(|index| {
            let path = CStr::from_ptr(*found.gl_pathv.add(index));
            PathBuf::from(OsStr::from_bytes(path.to_bytes()))
        });
        let paths = paths.collect();
        libc::globfree(&mut found);
        paths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_in_what_is_included_too() {
        let folder = std::env::temp_dir().join(format!("namesake.{}", std::process::id()));
        fs::create_dir_all(folder.join("conf.d")).unwrap();
        let main = folder.join("valkey.conf");
        let text = format!(
            "# loadmodule /no.so\nport 1\nLoadModule \"/a/one.so\" x=1\ninclude {}/conf.d/*.conf\n",
            folder.display()
        );
        fs::write(&main, text).unwrap();
        let inner = folder.join("conf.d/rdma.conf");
        fs::write(&inner, "\n\tloadmodule /b/two.so\ninclude /nobody\n").unwrap();

        let mut lines = Vec::new();
        read(&main, &[], &mut lines);
        let place = |file: &Path, line| Place { file: file.to_owned(), line };
        let wanted = [
            ("/a/one.so", place(&main, 3), vec![]),
            ("/b/two.so", place(&inner, 2), vec![place(&main, 4)]),
        ];
        let wanted = wanted.map(|(module, place, included)| LoadLine {
            module: module.into(),
            place,
            included,
        });
        assert_eq!(lines, wanted);
        let told =
            format!("line 2 of {}, included by line 4 of {}", inner.display(), main.display());
        assert_eq!(lines[1].to_string(), told);

        // One that includes itself ends somewhere.
        fs::write(&inner, format!("include {}\n", inner.display())).unwrap();
        read(&main, &[], &mut lines);
        fs::remove_dir_all(&folder).unwrap();
    }
}
