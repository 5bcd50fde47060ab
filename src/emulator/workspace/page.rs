//! Lists in pages.

use axum::Json;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;

/// The API's largest page, and its default here.
const MAX_PAGE: usize = 100;

/// Paging parameters of a list.
#[derive(Default, Deserialize)]
pub(super) struct Page {
    page_size: Option<usize>,
    page_token: Option<String>,
}

impl Page {
    /// One page of `items` under `key`, with the token of the next.
    pub(super) fn of(&self, key: &str, items: Vec<Value>) -> Result<Json<Value>, ApiError> {
        let size = self
            .page_size
            .filter(|size| *size > 0)
            .unwrap_or(MAX_PAGE)
            .min(MAX_PAGE);
        let start: usize = match self.page_token.as_deref().filter(|token| !token.is_empty()) {
            None => 0,
            Some(token) => token
                .strip_prefix("page-")
                .and_then(|offset| offset.parse().ok())
                .ok_or_else(|| ApiError::invalid("Invalid page token."))?,
        };
        let next = (items.len() > start.saturating_add(size))
            .then(|| format!("page-{}", start.saturating_add(size)));
        let page: Vec<Value> = items.into_iter().skip(start).take(size).collect();
        let mut body = json!({ key: page });
        if let (Some(next), Some(body)) = (next, body.as_object_mut()) {
            body.insert("next_page_token".to_owned(), next.into());
        }
        Ok(Json(body))
    }
}
