# Filled by `deploy/release collect` for each release. In a tap: Formula/lakebase-proxy.rb.
class LakebaseProxy < Formula
  desc "Any Postgres client reaches Databricks Lakebase on localhost, without a password"
  homepage "@REPOSITORY@"
  version "@VERSION@"
  license any_of: ["Apache-2.0", "MIT"]

  on_macos do
    on_arm do
      url "@REPOSITORY@/releases/download/v@VERSION@/lakebase-proxy-@VERSION@-aarch64-macos.tar.gz"
      sha256 "@aarch64-macos@"
    end
    on_intel do
      url "@REPOSITORY@/releases/download/v@VERSION@/lakebase-proxy-@VERSION@-x86_64-macos.tar.gz"
      sha256 "@x86_64-macos@"
    end
  end

  on_linux do
    on_arm do
      url "@REPOSITORY@/releases/download/v@VERSION@/lakebase-proxy-@VERSION@-aarch64-linux.tar.gz"
      sha256 "@aarch64-linux@"
    end
    on_intel do
      url "@REPOSITORY@/releases/download/v@VERSION@/lakebase-proxy-@VERSION@-x86_64-linux.tar.gz"
      sha256 "@x86_64-linux@"
    end
  end

  def install
    bin.install "bin/lakebase-proxy"
    man1.install Dir["share/man/man1/*"]
    bash_completion.install "share/bash-completion/completions/lakebase-proxy"
    fish_completion.install "share/fish/vendor_completions.d/lakebase-proxy.fish"
    zsh_completion.install "share/zsh/site-functions/_lakebase-proxy"
    pkgshare.install "share/lakebase-proxy/lakebase-proxy.toml", "share/lakebase-proxy/sql"
  end

  test do
    assert_match version.to_s, shell_output("#{bin}/lakebase-proxy --version")
  end
end
