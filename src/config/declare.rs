//! The macro behind the declaration of settings in [`settings`](super::settings).

/// What a reload does with a setting that has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reload {
    /// Applies it.
    Live,
    /// Adds and removes endpoints, as far as its change affects them.
    Endpoint,
    /// Leaves it as it is until a restart.
    Restart,
}

/// One declared setting, without its value. Its help text is in the [`clap::Command`].
#[derive(Clone, Debug)]
pub(crate) struct Setting {
    /// The key in the configuration file; with `-` for `_` the flag.
    pub(crate) key: &'static str,
    /// The heading in `--help` and in the annotated file.
    pub(crate) section: &'static str,
    pub(crate) default: Option<toml::Value>,
    /// A value for the annotated file, for settings without a default.
    pub(crate) example: Option<&'static str>,
    pub(crate) reload: Reload,
}

impl Setting {
    /// Whether a reload applies it.
    pub(crate) fn is_live(&self) -> bool {
        self.reload == Reload::Live
    }
}

/// Declares `Settings`: one layer of settings, whose fields are `None` where the layer does not set them, and for each field
/// a method of the same name with the value in force.
///
/// `key: Type = default => Reload;`, or `key: Type, "example" => Reload;` for a setting without a default.
macro_rules! settings {
    ($($section:literal {
        $($(#[$meta:meta])+ $key:ident: $type:ty $(= $default:expr)? $(, $example:literal)? => $reload:ident;)+
    })+) => {
        /// One layer of settings: flags and variables, or the configuration file. `config/lakebase-proxy.toml` explains each.
        #[derive(clap::Args, Clone, Debug, Default, serde::Deserialize, serde::Serialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Settings {
            $($(
                $(#[$meta])+
                #[arg(long, help_heading = $section)]
                // `Option`: where this layer sets nothing, the one below applies.
                pub $key: Option<$type>,
            )+)+

            /// An endpoint, where there are several: NAME or HOST, then ?port=&address=&database=&user=&read_only= (repeatable;
            /// without a port each takes the next one)
            #[arg(long = "endpoint", value_name = "NAME?KEY=VALUE", help_heading = "Upstream")]
            #[serde(rename = "endpoint", skip_serializing)]
            pub endpoints: Vec<super::EndpointSettings>,

            /// TOML file of settings, by the same names with underscores; flags and variables override it, SIGHUP reloads it
            #[arg(long, value_name = "FILE", help_heading = "Configuration file")]
            #[serde(skip)]
            pub config_file: Option<std::path::PathBuf>,

            /// The source of each setting.
            #[arg(skip)]
            #[serde(skip)]
            pub origins: super::Origins,
        }

        impl Settings {
            /// Every declared setting, in the order of the annotated file.
            pub(crate) fn declared() -> Vec<super::declare::Setting> {
                vec![$($(super::declare::Setting {
                    key: stringify!($key),
                    section: $section,
                    default: settings!(@toml $type $(, $default)?),
                    example: settings!(@example $($example)?),
                    reload: super::declare::Reload::$reload,
                },)+)+]
            }

            /// This layer, with `below` for what it does not set.
            #[must_use]
            pub fn or(self, below: Self) -> Self {
                Self {
                    $($($key: self.$key.or(below.$key),)+)+
                    // Not merged: flags replace all tables of the file.
                    endpoints: if self.endpoints.is_empty() { below.endpoints } else { self.endpoints },
                    config_file: self.config_file.or(below.config_file),
                    origins: self.origins.or(below.origins),
                }
            }

            /// The keys of this kind whose values differ.
            pub(super) fn differing(&self, new: &Self, kind: super::declare::Reload) -> Vec<&'static str> {
                let mut keys = Vec::new();
                // The values in force, so that a default that is now written out is no change.
                $($(if kind == super::declare::Reload::$reload && self.$key() != new.$key() {
                    keys.push(stringify!($key));
                })+)+
                keys
            }

            /// Takes over the settings of this kind.
            pub(super) fn take(&mut self, new: &Self, kind: super::declare::Reload) {
                $($(if kind == super::declare::Reload::$reload {
                    self.$key.clone_from(&new.$key);
                    self.origins.take(stringify!($key), &new.origins);
                })+)+
            }

            $($(
                #[doc = concat!("The value of `", stringify!($key), "` in force.")]
                pub fn $key(&self) -> settings!(@in_force $type $(, $default)?) {
                    self.$key.clone() $(.unwrap_or($default))?
                }
            )+)+
        }
    };
    (@in_force $type:ty, $default:expr) => { $type };
    (@in_force $type:ty) => { Option<$type> };
    (@toml $type:ty, $default:expr) => { toml::Value::try_from::<$type>($default).ok() };
    (@toml $type:ty) => { None };
    (@example $example:literal) => { Some($example) };
    (@example) => { None };
}
