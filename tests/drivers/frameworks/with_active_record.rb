# ActiveRecord: models and prepared statements, a connection for each thread.
require "active_record"

SCHEMA = "of_active_record"
WORKERS, ROUNDS, PAUSE = 3, 50, 0.02

ActiveRecord::Base.establish_connection(adapter: "postgresql", pool: WORKERS + 1, schema_search_path: SCHEMA, idle_timeout: 0)

class Item < ActiveRecord::Base
  self.table_name = "item"
end

ActiveRecord::Base.connection.tap do |c|
  c.execute("drop schema if exists #{SCHEMA} cascade")
  c.execute("create schema #{SCHEMA}")
  c.create_table(:item) { |t| t.integer(:worker); t.integer(:round); t.text(:note); t.index([:worker, :round], unique: true) }
end
ActiveRecord::Base.connection_pool.release_connection

def equal(what, found, expected)
  raise "#{SCHEMA}: #{what}: #{found.inspect} instead of #{expected.inspect}" unless found == expected
end

def one_round(c, worker, round, settings)
  note = ->(it) { "#{SCHEMA} #{worker} #{it}" }
  settings.each { |name, value| equal(name, c.select_value("select current_setting('#{name}')"), value) }
  own = Item.where(worker: worker)
  own.delete_all if round.zero?
  Item.transaction do
    Item.create!(worker: worker, round: round, note: note[round])
    begin
      Item.transaction(requires_new: true) { Item.create!(worker: worker, round: round, note: "twice") }
      raise "a key is not unique"
    rescue ActiveRecord::RecordNotUnique
    end
    equal("rows", [own.count, own.sum(:round)], [round + 1, round * (round + 1) / 2])
  end
  Item.transaction(isolation: :serializable) do
    c.execute("set local statement_timeout = '77s'")
    own.update_all(note: "undone")
    raise ActiveRecord::Rollback
  end
  # As migrations do.
  equal("lock", c.get_advisory_lock(4711 + worker), true)
  equal("unlock", c.release_advisory_lock(4711 + worker), true)
  equal("notes", own.order(:round).pluck(:note), (0..round).map(&note))
end

finish = Process.clock_gettime(Process::CLOCK_MONOTONIC) + ENV.fetch("ROUNDS_SECONDS").to_f
Thread.abort_on_exception = true
done = Array.new(WORKERS) do |worker|
  Thread.new do
    ActiveRecord::Base.connection_pool.with_connection do |c|
      settings = { "search_path" => SCHEMA, "timezone" => "Etc/GMT+#{worker}", "statement_timeout" => "#{30 + worker}s", "app.tenant" => "#{SCHEMA} #{worker}" }
      settings.each { |name, value| c.execute("set #{name} = '#{value}'") }
      count = 0
      while Process.clock_gettime(Process::CLOCK_MONOTONIC) < finish
        one_round(c, worker, count % ROUNDS, settings)
        count += 1
        sleep PAUSE
      end
      count
    end
  end
end
puts done.sum(&:value)
