//! The part of xl.cfg(5) that a driver domain's file uses: `key = value` lines with strings, numbers
//! and lists of strings; comments; lists over several lines.

use std::collections::BTreeMap;

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// A string or a number, as text.
    Text(String),
    /// A list of strings.
    List(Vec<String>),
}

/// Reads a file's text: its values, and what is not understood, by line.
pub fn parse(text: &str) -> (BTreeMap<String, Value>, Vec<String>) {
    let mut values = BTreeMap::new();
    let mut problems = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let mut line = strip_comment(line).trim().to_string();
        if line.is_empty() {
            continue;
        }
        let is_list = |line: &str| line.split_once('=').is_some_and(|(_, value)| value.trim_start().starts_with('['));
        while is_list(&line) && !line.ends_with(']') {
            let Some((_, more)) = lines.next() else { break };
            line.push(' ');
            line.push_str(strip_comment(more).trim());
        }
        let understood = line.split_once('=').and_then(|(key, value)| Some((key.trim(), value_of(value.trim())?)));
        match understood {
            Some((key, value)) => drop(values.insert(key.to_string(), value)),
            None => problems.push(format!("line {}: {line:?} is not understood", number + 1)),
        }
    }
    (values, problems)
}

/// The line without a comment; `#` inside quotes is text.
fn strip_comment(line: &str) -> &str {
    let mut quote = None;
    for (at, ch) in line.char_indices() {
        match (quote, ch) {
            (None, '#') => return line.get(..at).unwrap_or(line),
            (None, '"' | '\'') => quote = Some(ch),
            (Some(open), _) if open == ch => quote = None,
            _ => {}
        }
    }
    line
}

fn value_of(text: &str) -> Option<Value> {
    let Some(list) = text.strip_prefix('[') else { return Some(Value::Text(scalar(text)?)) };
    let list = list.strip_suffix(']')?;
    let mut items = Vec::new();
    let mut rest = list.trim();
    while !rest.is_empty() {
        let quote = rest.chars().next().filter(|ch| matches!(ch, '"' | '\''))?;
        let (item, after) = rest.get(1..)?.split_once(quote)?;
        items.push(item.to_string());
        rest = after.trim_start();
        rest = match rest.strip_prefix(',') {
            Some(more) => more.trim_start(),
            None if rest.is_empty() => rest,
            None => return None,
        };
    }
    Some(Value::List(items))
}

fn scalar(text: &str) -> Option<String> {
    let quoted = |quote: char| text.strip_prefix(quote)?.strip_suffix(quote);
    if let Some(inner) = quoted('"').or_else(|| quoted('\'')) {
        return (!inner.contains(['"', '\''])).then(|| inner.to_string());
    }
    let number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric());
    number.then(|| text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_numbers_lists_and_comments() {
        let (values, problems) = parse(
            "# a comment\nname = \"p0\" # more\nmemory=4\niomem = [ \"b0100,1\", # first\n 'b0028,1' ]\nextra = \"a #b\"\nempty = []\n",
        );
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(values["name"], Value::Text("p0".into()));
        assert_eq!(values["memory"], Value::Text("4".into()));
        assert_eq!(values["iomem"], Value::List(vec!["b0100,1".into(), "b0028,1".into()]));
        assert_eq!(values["extra"], Value::Text("a #b".into()));
        assert_eq!(values["empty"], Value::List(vec![]));
    }

    #[test]
    fn a_bracket_inside_a_string_starts_no_list() {
        let (values, problems) = parse("name = \"a[b\"\nmemory = 4\nextra = 'x' 'y'\n");
        assert_eq!(values["name"], Value::Text("a[b".into()));
        assert_eq!(values["memory"], Value::Text("4".into()));
        assert_eq!(problems.len(), 1);
    }

    #[test]
    fn what_is_not_understood_is_named_by_line() {
        let (values, problems) = parse("name = \"x\nnonsense\nlist = [ a ]\nok = 1\nopen = [ \"a\",\n");
        assert_eq!(values.len(), 1);
        assert_eq!(problems.len(), 4);
        assert!(problems[1].starts_with("line 2:"));
    }
}
