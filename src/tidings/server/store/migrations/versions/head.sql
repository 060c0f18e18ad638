CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL,
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
CREATE TABLE api_keys (
	id TEXT NOT NULL,
	app BIGINT NOT NULL,
	name TEXT NOT NULL,
	secret_hash BLOB NOT NULL,
	scopes TEXT NOT NULL,
	created_at BIGINT NOT NULL,
	expires_at BIGINT,
	revoked_at BIGINT,
	last_used_at BIGINT,
	PRIMARY KEY (id)
);
CREATE INDEX api_keys_app ON api_keys (app);
CREATE TABLE app_keys (
	app BIGINT NOT NULL,
	purpose TEXT NOT NULL,
	version BIGINT NOT NULL,
	root_kid TEXT NOT NULL,
	wrapped BLOB NOT NULL,
	created_at BIGINT NOT NULL,
	PRIMARY KEY (app, purpose, version)
);
CREATE TABLE apps (
	app INTEGER NOT NULL,
	id TEXT NOT NULL,
	name TEXT NOT NULL,
	settings TEXT NOT NULL,
	created_at BIGINT NOT NULL,
	PRIMARY KEY (app),
	UNIQUE (id)
);
CREATE TABLE audit (
	app BIGINT NOT NULL,
	id TEXT NOT NULL,
	at BIGINT NOT NULL,
	actor TEXT NOT NULL,
	action TEXT NOT NULL,
	target TEXT NOT NULL,
	detail TEXT DEFAULT '{}' NOT NULL,
	PRIMARY KEY (app, id)
);
CREATE INDEX audit_at ON audit (app, at, id);
CREATE TABLE channel_types (
	app BIGINT NOT NULL,
	name TEXT NOT NULL,
	definition TEXT NOT NULL,
	PRIMARY KEY (app, name)
);
CREATE TABLE channels (
	app BIGINT NOT NULL,
	id TEXT NOT NULL,
	sid BIGINT NOT NULL,
	type TEXT NOT NULL,
	sealed BLOB,
	labels TEXT DEFAULT '{}' NOT NULL,
	pair TEXT,
	created_by TEXT,
	created_at BIGINT NOT NULL,
	updated_at BIGINT NOT NULL,
	frozen BIGINT DEFAULT '0' NOT NULL,
	deleted_at BIGINT,
	member_count BIGINT DEFAULT '0' NOT NULL,
	PRIMARY KEY (app, id)
);
CREATE INDEX channels_created ON channels (app, created_at, id);
CREATE UNIQUE INDEX channels_pair ON channels (app, type, pair);
CREATE UNIQUE INDEX channels_sid ON channels (sid);
CREATE TABLE device_positions (
	app BIGINT NOT NULL,
	user TEXT NOT NULL,
	device TEXT NOT NULL,
	sid BIGINT NOT NULL,
	seq BIGINT NOT NULL,
	at BIGINT NOT NULL,
	PRIMARY KEY (app, user, device, sid)
)
 WITHOUT ROWID

;
CREATE TABLE devices (
	app BIGINT NOT NULL,
	user TEXT NOT NULL,
	id TEXT NOT NULL,
	platform TEXT,
	sealed BLOB,
	created_at BIGINT NOT NULL,
	last_seen_at BIGINT NOT NULL,
	PRIMARY KEY (app, user, id)
);
CREATE TABLE events (
	app BIGINT NOT NULL,
	sid BIGINT NOT NULL,
	seq BIGINT NOT NULL,
	type TEXT NOT NULL,
	at BIGINT NOT NULL,
	"by" TEXT,
	ref TEXT,
	item TEXT NOT NULL,
	sealed BLOB,
	redacted BIGINT DEFAULT '0' NOT NULL,
	PRIMARY KEY (app, sid, seq)
)
 WITHOUT ROWID

;
CREATE INDEX events_versions ON events (app, sid, ref, seq) WHERE type = 'message.updated';
CREATE TABLE identity_providers (
	app BIGINT NOT NULL,
	id TEXT NOT NULL,
	jwks_url TEXT NOT NULL,
	algorithms TEXT NOT NULL,
	cache_seconds BIGINT NOT NULL,
	created_at BIGINT NOT NULL,
	PRIMARY KEY (app, id)
);
CREATE TABLE labels (
	app BIGINT NOT NULL,
	noun TEXT NOT NULL,
	name TEXT NOT NULL,
	value TEXT NOT NULL,
	id TEXT NOT NULL,
	PRIMARY KEY (app, noun, name, value, id)
)
 WITHOUT ROWID

;
CREATE INDEX labels_id ON labels (app, noun, id);
CREATE TABLE members (
	app BIGINT NOT NULL,
	sid BIGINT NOT NULL,
	user TEXT NOT NULL,
	role TEXT NOT NULL,
	joined_at BIGINT NOT NULL,
	joined_seq BIGINT NOT NULL,
	delivered BIGINT DEFAULT '0' NOT NULL,
	read BIGINT DEFAULT '0' NOT NULL,
	read_counted BIGINT DEFAULT '0' NOT NULL,
	marked_from BIGINT,
	hidden BIGINT DEFAULT '0' NOT NULL,
	archived BIGINT DEFAULT '0' NOT NULL,
	muted_until BIGINT,
	moved_at BIGINT NOT NULL,
	PRIMARY KEY (app, sid, user)
)
 WITHOUT ROWID

;
CREATE INDEX members_user ON members (app, user, sid);
CREATE TABLE mentions (
	app BIGINT NOT NULL,
	sid BIGINT NOT NULL,
	user TEXT NOT NULL,
	seq BIGINT NOT NULL,
	PRIMARY KEY (app, sid, user, seq)
)
 WITHOUT ROWID

;
CREATE TABLE messages (
	app BIGINT NOT NULL,
	sid BIGINT NOT NULL,
	seq BIGINT NOT NULL,
	id TEXT NOT NULL,
	sender TEXT NOT NULL,
	"key" TEXT NOT NULL,
	digest BLOB NOT NULL,
	content_seq BIGINT NOT NULL,
	counted BIGINT NOT NULL,
	flags BIGINT NOT NULL,
	reply_to TEXT,
	at BIGINT NOT NULL,
	edits BIGINT DEFAULT '0' NOT NULL,
	edited_at BIGINT,
	edited_by TEXT,
	deleted_at BIGINT,
	deleted_by TEXT,
	sealed BLOB,
	redacted BIGINT DEFAULT '0' NOT NULL,
	PRIMARY KEY (app, sid, seq)
)
 WITHOUT ROWID

;
CREATE INDEX messages_deleted ON messages (app, sid, seq, flags, sender, deleted_at) WHERE deleted_at IS NOT NULL;
CREATE UNIQUE INDEX messages_id ON messages (app, id);
CREATE UNIQUE INDEX messages_key ON messages (app, sid, sender, "key");
CREATE INDEX messages_replies ON messages (app, sid, reply_to, seq) WHERE reply_to IS NOT NULL;
CREATE TABLE meta (
	name TEXT NOT NULL,
	value TEXT NOT NULL,
	PRIMARY KEY (name)
);
CREATE TABLE outbox (
	id INTEGER NOT NULL,
	app BIGINT NOT NULL,
	sid BIGINT NOT NULL,
	seq BIGINT NOT NULL,
	type TEXT NOT NULL,
	PRIMARY KEY (id)
);
CREATE TABLE reactions (
	app BIGINT NOT NULL,
	sid BIGINT NOT NULL,
	message_seq BIGINT NOT NULL,
	emoji TEXT NOT NULL,
	user TEXT NOT NULL,
	at BIGINT NOT NULL,
	PRIMARY KEY (app, sid, message_seq, emoji, user)
)
 WITHOUT ROWID

;
CREATE TABLE relations (
	app BIGINT NOT NULL,
	user TEXT NOT NULL,
	other TEXT NOT NULL,
	kind TEXT NOT NULL,
	PRIMARY KEY (app, user, other, kind)
);
CREATE INDEX relations_other ON relations (app, other);
CREATE TABLE revoked_tokens (
	app BIGINT NOT NULL,
	jti TEXT NOT NULL,
	expires_at BIGINT NOT NULL,
	PRIMARY KEY (app, jti)
);
CREATE TABLE roles (
	app BIGINT NOT NULL,
	scope TEXT NOT NULL,
	name TEXT NOT NULL,
	grants TEXT NOT NULL,
	PRIMARY KEY (app, scope, name)
);
CREATE TABLE signing_keys (
	app BIGINT NOT NULL,
	kid TEXT NOT NULL,
	algorithm TEXT NOT NULL,
	sealed BLOB,
	public_key TEXT,
	status TEXT NOT NULL,
	created_at BIGINT NOT NULL,
	PRIMARY KEY (app, kid)
);
CREATE TABLE streams (
	sid INTEGER NOT NULL,
	app BIGINT NOT NULL,
	kind TEXT NOT NULL,
	ref TEXT NOT NULL,
	epoch TEXT NOT NULL,
	head BIGINT DEFAULT '0' NOT NULL,
	counted BIGINT DEFAULT '0' NOT NULL,
	messages BIGINT DEFAULT '0' NOT NULL,
	floor BIGINT DEFAULT '0' NOT NULL,
	moved_at BIGINT NOT NULL,
	last_message_at BIGINT,
	access_version BIGINT DEFAULT '1' NOT NULL,
	key_wrapped BLOB,
	key_version BIGINT,
	key_app_version BIGINT,
	PRIMARY KEY (sid)
);
CREATE INDEX streams_moved ON streams (app, moved_at);
CREATE UNIQUE INDEX streams_ref ON streams (app, kind, ref);
CREATE TABLE users (
	app BIGINT NOT NULL,
	id TEXT NOT NULL,
	sid BIGINT NOT NULL,
	role TEXT NOT NULL,
	sealed BLOB,
	labels TEXT DEFAULT '{}' NOT NULL,
	created_at BIGINT NOT NULL,
	updated_at BIGINT NOT NULL,
	last_seen_at BIGINT,
	deactivated_at BIGINT,
	deleted_at BIGINT,
	tokens_after BIGINT DEFAULT '0' NOT NULL,
	invisible BIGINT DEFAULT '0' NOT NULL,
	PRIMARY KEY (app, id)
);
CREATE INDEX users_created ON users (app, created_at, id);
CREATE INDEX members_moved ON members (app, user, moved_at);
CREATE INDEX members_role ON members (app, sid, role, user);
CREATE TABLE jobs (
	id INTEGER NOT NULL,
	app BIGINT NOT NULL,
	kind TEXT NOT NULL,
	"key" TEXT NOT NULL,
	priority BIGINT DEFAULT '1' NOT NULL,
	due_at BIGINT NOT NULL,
	lease BIGINT DEFAULT '0' NOT NULL,
	rearmed BIGINT DEFAULT '0' NOT NULL,
	attempts BIGINT DEFAULT '0' NOT NULL,
	payload BLOB,
	error TEXT,
	created_at BIGINT NOT NULL,
	dead_at BIGINT,
	PRIMARY KEY (id)
);
CREATE INDEX jobs_dead ON jobs (app, id) WHERE dead_at IS NOT NULL;
CREATE INDEX jobs_due ON jobs (kind, priority, due_at) WHERE dead_at IS NULL;
CREATE UNIQUE INDEX jobs_key ON jobs (kind, app, "key");
CREATE TABLE notification_preferences (
	app BIGINT NOT NULL,
	user TEXT NOT NULL,
	device TEXT NOT NULL,
	sid BIGINT NOT NULL,
	definition TEXT NOT NULL,
	updated_at BIGINT NOT NULL,
	PRIMARY KEY (app, user, device, sid)
)
 WITHOUT ROWID

;
CREATE TABLE presend_hooks (
	app BIGINT NOT NULL,
	definition TEXT NOT NULL,
	sealed BLOB NOT NULL,
	updated_at BIGINT NOT NULL,
	PRIMARY KEY (app)
);
CREATE TABLE push_log (
	app BIGINT NOT NULL,
	sid BIGINT NOT NULL,
	seq BIGINT NOT NULL,
	user TEXT NOT NULL,
	device TEXT NOT NULL,
	id TEXT NOT NULL,
	at BIGINT NOT NULL,
	outcome TEXT NOT NULL,
	reason TEXT NOT NULL,
	provider TEXT,
	detail TEXT,
	PRIMARY KEY (app, sid, seq, user, device, id)
)
 WITHOUT ROWID

;
CREATE INDEX push_log_at ON push_log (at);
CREATE TABLE push_providers (
	app BIGINT NOT NULL,
	id TEXT NOT NULL,
	kind TEXT NOT NULL,
	definition TEXT NOT NULL,
	sealed BLOB,
	status TEXT NOT NULL,
	error TEXT,
	created_at BIGINT NOT NULL,
	updated_at BIGINT NOT NULL,
	PRIMARY KEY (app, id)
);
CREATE TABLE push_tokens (
	app BIGINT NOT NULL,
	user TEXT NOT NULL,
	device TEXT NOT NULL,
	provider TEXT NOT NULL,
	digest BLOB NOT NULL,
	sealed BLOB NOT NULL,
	language TEXT,
	created_at BIGINT NOT NULL,
	updated_at BIGINT NOT NULL,
	PRIMARY KEY (app, user, device, provider)
);
CREATE UNIQUE INDEX push_tokens_digest ON push_tokens (app, provider, digest);
CREATE TABLE webhook_deliveries (
	app BIGINT NOT NULL,
	webhook TEXT NOT NULL,
	id TEXT NOT NULL,
	message TEXT NOT NULL,
	type TEXT NOT NULL,
	sid BIGINT,
	seq BIGINT,
	at BIGINT NOT NULL,
	attempt BIGINT NOT NULL,
	outcome TEXT NOT NULL,
	status BIGINT,
	milliseconds BIGINT NOT NULL,
	error TEXT,
	sealed BLOB,
	PRIMARY KEY (app, webhook, id)
)
 WITHOUT ROWID

;
CREATE INDEX webhook_deliveries_at ON webhook_deliveries (at);
CREATE INDEX webhook_deliveries_message ON webhook_deliveries (app, sid, seq);
CREATE TABLE webhooks (
	app BIGINT NOT NULL,
	id TEXT NOT NULL,
	definition TEXT NOT NULL,
	sealed BLOB NOT NULL,
	status TEXT NOT NULL,
	reason TEXT,
	created_at BIGINT NOT NULL,
	updated_at BIGINT NOT NULL,
	failing_since BIGINT,
	paused_until BIGINT,
	failures BIGINT DEFAULT '0' NOT NULL,
	PRIMARY KEY (app, id)
);
INSERT INTO alembic_version(version_num) VALUES ('0004');
INSERT INTO meta(name,value) VALUES ('schema_revision','0004');
