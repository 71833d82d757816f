//! The documents that say which test shows what: each test that they name is there, and no row is without a mark.
//! A column "shown by" names tests and scenarios in backticks; nothing else in it stands in backticks.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rig::scenarios;
use rig::tools::root;

/// The documents that are looked at.
const DOCUMENTS: [&str; 3] = ["parity.md", "cases.md", "security.md"];

/// The marks of a row.
const MARKS: [&str; 4] = ["done", "different", "n/a", "open"];

/// One row of a table whose last column is "shown by".
struct Row {
    place: String,
    /// The columns of the table, by name.
    cells: Vec<(String, String)>,
}

impl Row {
    fn cell(&self, column: &str) -> Option<&str> {
        self.cells.iter().find(|(name, _)| name == column).map(|(_, text)| text.as_str())
    }

    /// What stands in backticks in the last column.
    fn named(&self) -> Vec<&str> {
        self.cells.last().map_or_else(Vec::new, |(_, text)| text.split('`').skip(1).step_by(2).collect())
    }

    /// The word of its mark, and who is to do it where it is open.
    fn mark(&self) -> Option<(&str, &str)> {
        let text = self.cell("mark")?.trim_matches('`');
        let (word, who) = text.split_once(' ').unwrap_or((text, ""));
        MARKS.contains(&word).then_some((word, who))
    }

    fn is_open(&self) -> bool {
        self.mark().is_some_and(|(word, _)| word == "open")
    }
}

/// The cells of a line of a table.
fn cells(line: &str) -> Option<Vec<String>> {
    let line = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    Some(line.split('|').map(|cell| cell.trim().to_string()).collect())
}

/// The rows of all tables of a document whose last column is "shown by".
fn rows(document: &str) -> Vec<Row> {
    let text = fs::read_to_string(root().join("docs").join(document)).unwrap_or_default();
    let mut rows = Vec::new();
    let mut header: Option<Vec<String>> = None;
    for (number, line) in text.lines().enumerate() {
        let Some(cells) = cells(line) else {
            header = None;
            continue;
        };
        let Some(names) = &header else {
            header = Some(cells);
            continue;
        };
        if names.last().is_none_or(|name| name != "shown by")
            || cells.iter().all(|cell| cell.trim_matches('-').is_empty())
        {
            continue;
        }
        let place = format!("docs/{document}:{}", number + 1);
        assert_eq!(cells.len(), names.len(), "{place}: as many columns as the table's head");
        rows.push(Row { place, cells: names.iter().cloned().zip(cells).collect() });
    }
    rows
}

/// Names of the test functions in all Rust sources below `folder`.
fn tests(folder: &Path, into: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("a folder of the tree") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            tests(&path, into);
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path).expect("a source");
            let mut is_test = false;
            for line in text.lines().map(str::trim) {
                if line.starts_with("#[test]") {
                    is_test = true;
                } else if let Some(rest) = line.strip_prefix("fn ").filter(|_| is_test) {
                    into.extend(rest.split_once('(').map(|(name, _)| name.to_string()));
                    is_test = false;
                }
            }
        }
    }
}

/// All that a column "shown by" may name.
fn known() -> BTreeSet<String> {
    let mut known: BTreeSet<String> = scenarios::ALL.iter().map(|scenario| scenario.name.to_string()).collect();
    tests(&root(), &mut known);
    assert!(known.contains("every_test_that_is_named_is_there"), "this test finds itself");
    known
}

#[test]
fn every_test_that_is_named_is_there() {
    let known = known();
    let mut wrong = Vec::new();
    for row in DOCUMENTS.iter().flat_map(|document| rows(document)).filter(|row| !row.is_open()) {
        for name in row.named().into_iter().filter(|name| !known.contains(*name)) {
            wrong.push(format!("{}: no test or scenario {name}", row.place));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_row_has_a_mark_and_what_it_stands_on() {
    let mut rows = rows("parity.md");
    assert!(rows.len() > 200, "the tables are found");
    rows.extend(self::rows("cases.md"));
    let mut wrong = Vec::new();
    for row in rows {
        let place = &row.place;
        match row.mark() {
            None => wrong.push(format!("{place}: no mark")),
            Some(("done", _)) if row.named().is_empty() => wrong.push(format!("{place}: done, and no test shows it")),
            Some(("different" | "n/a", _)) if row.cell("shown by").is_none_or(str::is_empty) => {
                wrong.push(format!("{place}: no reason"));
            }
            Some(_) => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_row_is_open() {
    let open: Vec<String> = ["parity.md", "cases.md"]
        .iter()
        .flat_map(|document| rows(document))
        .filter(|row| row.is_open())
        .map(|row| {
            format!(
                "{}: {} {}",
                row.place,
                row.cells.first().map_or("", |(_, text)| text),
                row.mark().unwrap_or_default().1
            )
        })
        .collect();
    assert!(open.is_empty(), "{} open rows\n{}", open.len(), open.join("\n"));
}
