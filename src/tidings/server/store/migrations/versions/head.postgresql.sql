CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
CREATE TABLE api_keys (
    id TEXT COLLATE "C" NOT NULL,
    app BIGINT NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    secret_hash BYTEA NOT NULL,
    scopes TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT,
    revoked_at BIGINT,
    last_used_at BIGINT,
    PRIMARY KEY (id)
);
CREATE INDEX api_keys_app ON api_keys (app);
CREATE TABLE app_keys (
    app BIGINT NOT NULL,
    purpose TEXT COLLATE "C" NOT NULL,
    version BIGINT NOT NULL,
    root_kid TEXT COLLATE "C" NOT NULL,
    wrapped BYTEA NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (app, purpose, version)
);
CREATE TABLE apps (
    app BIGSERIAL NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    settings TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (app),
    UNIQUE (id)
);
CREATE TABLE audit (
    app BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    at BIGINT NOT NULL,
    actor TEXT COLLATE "C" NOT NULL,
    action TEXT COLLATE "C" NOT NULL,
    target TEXT COLLATE "C" NOT NULL,
    detail TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
    PRIMARY KEY (app, id)
);
CREATE INDEX audit_at ON audit (app, at, id);
CREATE TABLE channel_types (
    app BIGINT NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    definition TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (app, name)
);
CREATE TABLE channels (
    app BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    sid BIGINT NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    sealed BYTEA,
    labels TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
    pair TEXT COLLATE "C",
    created_by TEXT COLLATE "C",
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
    "user" TEXT COLLATE "C" NOT NULL,
    device TEXT COLLATE "C" NOT NULL,
    sid BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (app, "user", device, sid)
);
CREATE TABLE devices (
    app BIGINT NOT NULL,
    "user" TEXT COLLATE "C" NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    platform TEXT COLLATE "C",
    sealed BYTEA,
    created_at BIGINT NOT NULL,
    last_seen_at BIGINT NOT NULL,
    PRIMARY KEY (app, "user", id)
);
CREATE TABLE events (
    app BIGINT NOT NULL,
    sid BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    at BIGINT NOT NULL,
    by TEXT COLLATE "C",
    ref TEXT COLLATE "C",
    item TEXT COLLATE "C" NOT NULL,
    sealed BYTEA,
    redacted BIGINT DEFAULT '0' NOT NULL,
    PRIMARY KEY (app, sid, seq)
);
ALTER TABLE events ALTER COLUMN sealed SET STORAGE EXTERNAL;
CREATE INDEX events_versions ON events (app, sid, ref, seq) WHERE type = 'message.updated';
CREATE TABLE identity_providers (
    app BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    jwks_url TEXT COLLATE "C" NOT NULL,
    algorithms TEXT COLLATE "C" NOT NULL,
    cache_seconds BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (app, id)
);
CREATE TABLE labels (
    app BIGINT NOT NULL,
    noun TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    value TEXT COLLATE "C" NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (app, noun, name, value, id)
);
CREATE INDEX labels_id ON labels (app, noun, id);
CREATE TABLE members (
    app BIGINT NOT NULL,
    sid BIGINT NOT NULL,
    "user" TEXT COLLATE "C" NOT NULL,
    role TEXT COLLATE "C" NOT NULL,
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
    PRIMARY KEY (app, sid, "user")
);
ALTER TABLE members SET (fillfactor = 80);
CREATE INDEX members_user ON members (app, "user", sid);
CREATE TABLE mentions (
    app BIGINT NOT NULL,
    sid BIGINT NOT NULL,
    "user" TEXT COLLATE "C" NOT NULL,
    seq BIGINT NOT NULL,
    PRIMARY KEY (app, sid, "user", seq)
);
CREATE TABLE messages (
    app BIGINT NOT NULL,
    sid BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    sender TEXT COLLATE "C" NOT NULL,
    key TEXT COLLATE "C" NOT NULL,
    digest BYTEA NOT NULL,
    content_seq BIGINT NOT NULL,
    counted BIGINT NOT NULL,
    flags BIGINT NOT NULL,
    reply_to TEXT COLLATE "C",
    at BIGINT NOT NULL,
    edits BIGINT DEFAULT '0' NOT NULL,
    edited_at BIGINT,
    edited_by TEXT COLLATE "C",
    deleted_at BIGINT,
    deleted_by TEXT COLLATE "C",
    sealed BYTEA,
    redacted BIGINT DEFAULT '0' NOT NULL,
    PRIMARY KEY (app, sid, seq)
);
ALTER TABLE messages ALTER COLUMN sealed SET STORAGE EXTERNAL;
CREATE INDEX messages_deleted ON messages (app, sid, seq, flags, sender, deleted_at) WHERE deleted_at IS NOT NULL;
CREATE UNIQUE INDEX messages_id ON messages (app, id);
CREATE UNIQUE INDEX messages_key ON messages (app, sid, sender, key);
CREATE INDEX messages_replies ON messages (app, sid, reply_to, seq) WHERE reply_to IS NOT NULL;
CREATE TABLE meta (
    name TEXT COLLATE "C" NOT NULL,
    value TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (name)
);
CREATE TABLE outbox (
    id BIGSERIAL NOT NULL,
    app BIGINT NOT NULL,
    sid BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE reactions (
    app BIGINT NOT NULL,
    sid BIGINT NOT NULL,
    message_seq BIGINT NOT NULL,
    emoji TEXT COLLATE "C" NOT NULL,
    "user" TEXT COLLATE "C" NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (app, sid, message_seq, emoji, "user")
);
CREATE TABLE relations (
    app BIGINT NOT NULL,
    "user" TEXT COLLATE "C" NOT NULL,
    other TEXT COLLATE "C" NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (app, "user", other, kind)
);
CREATE INDEX relations_other ON relations (app, other);
CREATE TABLE revoked_tokens (
    app BIGINT NOT NULL,
    jti TEXT COLLATE "C" NOT NULL,
    expires_at BIGINT NOT NULL,
    PRIMARY KEY (app, jti)
);
CREATE TABLE roles (
    app BIGINT NOT NULL,
    scope TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    grants TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (app, scope, name)
);
CREATE TABLE signing_keys (
    app BIGINT NOT NULL,
    kid TEXT COLLATE "C" NOT NULL,
    algorithm TEXT COLLATE "C" NOT NULL,
    sealed BYTEA,
    public_key TEXT COLLATE "C",
    status TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    PRIMARY KEY (app, kid)
);
CREATE TABLE streams (
    sid BIGSERIAL NOT NULL,
    app BIGINT NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    ref TEXT COLLATE "C" NOT NULL,
    epoch TEXT COLLATE "C" NOT NULL,
    head BIGINT DEFAULT '0' NOT NULL,
    counted BIGINT DEFAULT '0' NOT NULL,
    messages BIGINT DEFAULT '0' NOT NULL,
    floor BIGINT DEFAULT '0' NOT NULL,
    moved_at BIGINT NOT NULL,
    last_message_at BIGINT,
    access_version BIGINT DEFAULT '1' NOT NULL,
    key_wrapped BYTEA,
    key_version BIGINT,
    key_app_version BIGINT,
    PRIMARY KEY (sid)
);
ALTER TABLE streams SET (fillfactor = 50);
CREATE INDEX streams_moved ON streams (app, moved_at);
CREATE UNIQUE INDEX streams_ref ON streams (app, kind, ref);
CREATE TABLE users (
    app BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    sid BIGINT NOT NULL,
    role TEXT COLLATE "C" NOT NULL,
    sealed BYTEA,
    labels TEXT COLLATE "C" DEFAULT '{}' NOT NULL,
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
INSERT INTO alembic_version (version_num) VALUES ('0001') RETURNING alembic_version.version_num;
CREATE INDEX members_moved ON members (app, "user", moved_at);
UPDATE alembic_version SET version_num='0002' WHERE alembic_version.version_num = '0001';
CREATE INDEX members_role ON members (app, sid, role, "user");
UPDATE alembic_version SET version_num='0003' WHERE alembic_version.version_num = '0002';
CREATE TABLE jobs (
    id BIGSERIAL NOT NULL,
    app BIGINT NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    key TEXT COLLATE "C" NOT NULL,
    priority BIGINT DEFAULT '1' NOT NULL,
    due_at BIGINT NOT NULL,
    lease BIGINT DEFAULT '0' NOT NULL,
    rearmed BIGINT DEFAULT '0' NOT NULL,
    attempts BIGINT DEFAULT '0' NOT NULL,
    payload BYTEA,
    error TEXT COLLATE "C",
    created_at BIGINT NOT NULL,
    dead_at BIGINT,
    PRIMARY KEY (id)
);
CREATE INDEX jobs_dead ON jobs (app, id) WHERE dead_at IS NOT NULL;
CREATE INDEX jobs_due ON jobs (kind, priority, due_at) WHERE dead_at IS NULL;
CREATE UNIQUE INDEX jobs_key ON jobs (kind, app, key);
CREATE TABLE notification_preferences (
    app BIGINT NOT NULL,
    "user" TEXT COLLATE "C" NOT NULL,
    device TEXT COLLATE "C" NOT NULL,
    sid BIGINT NOT NULL,
    definition TEXT COLLATE "C" NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (app, "user", device, sid)
);
CREATE TABLE presend_hooks (
    app BIGINT NOT NULL,
    definition TEXT COLLATE "C" NOT NULL,
    sealed BYTEA NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (app)
);
CREATE TABLE push_log (
    app BIGINT NOT NULL,
    sid BIGINT NOT NULL,
    seq BIGINT NOT NULL,
    "user" TEXT COLLATE "C" NOT NULL,
    device TEXT COLLATE "C" NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    at BIGINT NOT NULL,
    outcome TEXT COLLATE "C" NOT NULL,
    reason TEXT COLLATE "C" NOT NULL,
    provider TEXT COLLATE "C",
    detail TEXT COLLATE "C",
    PRIMARY KEY (app, sid, seq, "user", device, id)
);
CREATE INDEX push_log_at ON push_log (at);
CREATE TABLE push_providers (
    app BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    definition TEXT COLLATE "C" NOT NULL,
    sealed BYTEA,
    status TEXT COLLATE "C" NOT NULL,
    error TEXT COLLATE "C",
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (app, id)
);
CREATE TABLE push_tokens (
    app BIGINT NOT NULL,
    "user" TEXT COLLATE "C" NOT NULL,
    device TEXT COLLATE "C" NOT NULL,
    provider TEXT COLLATE "C" NOT NULL,
    digest BYTEA NOT NULL,
    sealed BYTEA NOT NULL,
    language TEXT COLLATE "C",
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (app, "user", device, provider)
);
CREATE UNIQUE INDEX push_tokens_digest ON push_tokens (app, provider, digest);
CREATE TABLE webhook_deliveries (
    app BIGINT NOT NULL,
    webhook TEXT COLLATE "C" NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    message TEXT COLLATE "C" NOT NULL,
    type TEXT COLLATE "C" NOT NULL,
    sid BIGINT,
    seq BIGINT,
    at BIGINT NOT NULL,
    attempt BIGINT NOT NULL,
    outcome TEXT COLLATE "C" NOT NULL,
    status BIGINT,
    milliseconds BIGINT NOT NULL,
    error TEXT COLLATE "C",
    sealed BYTEA,
    PRIMARY KEY (app, webhook, id)
);
CREATE INDEX webhook_deliveries_at ON webhook_deliveries (at);
CREATE INDEX webhook_deliveries_message ON webhook_deliveries (app, sid, seq);
CREATE TABLE webhooks (
    app BIGINT NOT NULL,
    id TEXT COLLATE "C" NOT NULL,
    definition TEXT COLLATE "C" NOT NULL,
    sealed BYTEA NOT NULL,
    status TEXT COLLATE "C" NOT NULL,
    reason TEXT COLLATE "C",
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    failing_since BIGINT,
    paused_until BIGINT,
    failures BIGINT DEFAULT '0' NOT NULL,
    PRIMARY KEY (app, id)
);
UPDATE alembic_version SET version_num='0004' WHERE alembic_version.version_num = '0003';
INSERT INTO meta(name,value) VALUES ('schema_revision','0004');
INSERT INTO meta(name,value) VALUES ('compatible_from','0001');
