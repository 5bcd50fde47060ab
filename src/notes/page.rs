//! The pages, written by one template that escapes every value.

use askama::Template;

use super::{database::Note, problem::Problem};

/// The page with the notes, and with a form where notes can be added.
pub(super) fn notes(notes: &[Note], has_form: bool) -> Result<String, askama::Error> {
    Page {
        title: "Hello from Lakebase!",
        view: View::Notes { notes, has_form },
    }
    .render()
}

/// The page that explains why there are no notes.
pub(super) fn problem(problem: Problem) -> Result<String, askama::Error> {
    let view = View::Message {
        text: problem.explanation(),
        statement: problem.statement(),
        link: "Try again",
    };
    Page {
        title: problem.heading(),
        view,
    }
    .render()
}

/// Any other page.
pub(super) fn message(title: &str, text: &str) -> Result<String, askama::Error> {
    Page {
        title,
        view: View::Message {
            text,
            statement: None,
            link: "To the notes",
        },
    }
    .render()
}

#[derive(Template)]
#[template(path = "page.html", config = "src/notes/askama.toml")]
struct Page<'a> {
    title: &'a str,
    view: View<'a>,
}

enum View<'a> {
    Notes {
        notes: &'a [Note],
        has_form: bool,
    },
    Message {
        text: &'a str,
        statement: Option<&'a str>,
        link: &'a str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(content: &str, at: Option<&str>) -> Note {
        Note {
            content: content.to_owned(),
            created_at: at.map(|at| at.parse().unwrap()),
        }
    }

    #[test]
    fn a_note_that_holds_markup_shows_as_text() {
        let hostile = r#"</p><script>alert("1")</script><img src=x onerror='alert(2)'>&amp;"#;
        let page = notes(&[note(hostile, None)], true).unwrap();
        assert!(
            !page.contains("<script") && !page.contains("<img src=x") && !page.contains("&amp;<"),
            "{page}"
        );
        assert!(
            page.contains("&#60;script&#62;alert(&#34;1&#34;)&#60;/script&#62;"),
            "{page}"
        );
        assert!(
            page.contains("&#38;amp;"),
            "an entity in a note is text too: {page}"
        );
    }

    #[test]
    fn times_are_there_for_people_and_for_machines() {
        let page = notes(
            &[
                note("timed", Some("2026-03-01T09:05:07Z")),
                note("timeless", None),
            ],
            false,
        )
        .unwrap();
        assert!(
            page.contains(
                r#"<time datetime="2026-03-01T09:05:07Z">1 March 2026, 09:05 UTC</time>"#
            ),
            "{page}"
        );
        assert_eq!(page.matches("<time").count(), 1);
    }

    #[test]
    fn an_empty_table_is_not_an_error_and_looks_like_none() {
        let page = notes(&[], true).unwrap();
        assert!(
            page.contains("Recent Notes") && page.contains("No notes yet"),
            "{page}"
        );
    }

    #[test]
    fn the_form_is_there_where_notes_can_be_added() {
        let page = |has_form| notes(&[], has_form).unwrap();
        assert!(
            page(true).contains("<form method=\"post\" action=\"/\"")
                && !page(false).contains("<form")
        );
    }

    #[test]
    fn no_page_refreshes_itself_or_carries_inline_code() {
        let pages = [
            notes(&[note("x", None)], true),
            problem(Problem::Waking),
            problem(Problem::NoTable),
            message("a", "b"),
        ];
        for page in pages {
            let page = page.unwrap();
            for banned in [
                "http-equiv",
                "<script",
                "<style",
                " style=",
                " onload",
                "http://",
                "https://",
            ] {
                assert!(!page.contains(banned), "{banned} in {page}");
            }
        }
    }
}
