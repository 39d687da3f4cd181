package etcd_test

// Settings, certificates, and prefixes that hold something else.

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/etcd"
	"merlon.dev/integration/stage"
)

func clientAlarm(r *clientv3.AlarmResponse) *clientv3.AlarmMember {
	return &clientv3.AlarmMember{MemberID: r.Alarms[0].MemberID, Alarm: etcdserverpb.AlarmType_NOSPACE}
}

func TestValidate(t *testing.T) {
	secure := etcd.Config{Endpoints: []string{"https://a:2379"}, CAFile: "ca", CertFile: "cert", KeyFile: "key"}
	with := func(change func(*etcd.Config)) etcd.Config {
		c := secure
		change(&c)
		return c
	}
	for name, test := range map[string]struct {
		cfg  etcd.Config
		want string // in the error; empty: none
	}{
		"secure":            {secure, ""},
		"IPv6":              {with(func(c *etcd.Config) { c.Endpoints = []string{"https://[2001:db8::1]:2379"} }), ""},
		"loopback":          {etcd.Config{Endpoints: []string{"http://127.0.0.1:2379", "http://[::1]:2379", "http://localhost:2379"}}, ""},
		"prefix":            {with(func(c *etcd.Config) { c.Prefix = "/td/" }), ""},
		"none":              {etcd.Config{}, "no endpoints"},
		"plain":             {etcd.Config{Endpoints: []string{"http://10.0.0.1:2379"}}, "loopback"},
		"plain by name":     {etcd.Config{Endpoints: []string{"http://localhost.example.org:2379"}}, "loopback"},
		"no scheme":         {etcd.Config{Endpoints: []string{"a:2379"}}, "https://host:2379"},
		"no port":           {with(func(c *etcd.Config) { c.Endpoints = []string{"https://a"} }), "https://host:2379"},
		"path":              {with(func(c *etcd.Config) { c.Endpoints = []string{"https://a:2379/x"} }), "https://host:2379"},
		"password":          {with(func(c *etcd.Config) { c.Endpoints = []string{"https://u:p@a:2379"} }), "https://host:2379"},
		"twice":             {with(func(c *etcd.Config) { c.Endpoints = []string{"https://a:2379", "https://a:2379"} }), "twice"},
		"no CA":             {with(func(c *etcd.Config) { c.CAFile = "" }), "CA"},
		"no certificate":    {with(func(c *etcd.Config) { c.CertFile = "" }), "certificate"},
		"no key":            {with(func(c *etcd.Config) { c.KeyFile = "" }), "key"},
		"prefix, no slash":  {with(func(c *etcd.Config) { c.Prefix = "/td" }), "slash"},
		"prefix, long":      {with(func(c *etcd.Config) { c.Prefix = strings.Repeat("p", 64) + "/" }), "64"},
		"prefix, unseen":    {with(func(c *etcd.Config) { c.Prefix = "/a\x00b/" }), "printable"},
		"plain and secured": {with(func(c *etcd.Config) { c.Endpoints = append(c.Endpoints, "http://a:2379") }), "loopback"},
	} {
		err := test.cfg.Validate()
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: Validate() = %v; want %q", name, err, test.want)
		}
	}
}

func TestMutualTLS(t *testing.T) {
	t.Parallel()
	e, foreign := stage.StartEtcd(t, 1), stage.StartEtcd(t, 1)
	roots := x509.NewCertPool()
	text, err := os.ReadFile(e.Files.CA)
	if err != nil || !roots.AppendCertsFromPEM(text) {
		t.Fatal(err)
	}
	bare, err := clientv3.New(clientv3.Config{
		Endpoints: e.Endpoints(), TLS: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots}, Logger: zap.NewNop(), MaxUnaryRetries: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := bare.Get(ctx, "a"); err == nil {
		t.Error("etcd answered a client without a certificate")
	}
	cfg := config(e)
	cfg.RequestTimeout = 500 * time.Millisecond
	cfg.CertFile, cfg.KeyFile = foreign.Files.Cert, foreign.Files.Key
	if _, err := etcd.Open(t.Context(), cfg); !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("Open with a certificate of another CA = %v; want an error that hints at it", err)
	}
	// Also where the caller gives up before the request would.
	cfg.RequestTimeout = 0
	hurry, stop := context.WithTimeout(t.Context(), 3*time.Second)
	defer stop()
	if _, err := etcd.Open(hurry, cfg); err == nil || !strings.Contains(err.Error(), "tls: ") {
		t.Errorf("Open in a hurry with a certificate of another CA = %v; want the reason of TLS", err)
	}
	cfg = config(e)
	cfg.RequestTimeout = 500 * time.Millisecond
	cfg.CAFile = foreign.Files.CA
	if _, err := etcd.Open(t.Context(), cfg); !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "unknown authority") {
		t.Errorf("Open with another CA of the members = %v; want an error that says so", err)
	}
	cfg = config(e)
	cfg.KeyFile = cfg.CertFile
	if _, err := etcd.Open(t.Context(), cfg); err == nil || errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Open without a key = %v; want an error about the file", err)
	}
}

// Certificates are replaced while the store is open.
func TestCertificatesAreReadAgain(t *testing.T) {
	t.Parallel()
	e, foreign := stage.StartEtcd(t, 1), stage.StartEtcd(t, 1)
	cfg := config(e)
	cfg.RequestTimeout = 2 * time.Second
	files := e.Issue("first")
	cfg.CAFile, cfg.CertFile, cfg.KeyFile = files.CA, files.Cert, files.Key
	s := open(t, cfg)
	defer s.Close()
	works := func() error {
		_, err := s.Txn(t.Context(), nil, []store.Op{store.Put("a", nil)}, nil)
		return err
	}
	replace := func(with stage.EtcdFiles) {
		for from, to := range map[string]string{with.Cert: files.Cert, with.Key: files.Key} {
			copyFile(t, from, to)
		}
		e.Members[0].Restart() // ends the connections
	}
	replace(e.Issue("second"))
	eventually(t, "new files work", works)
	replace(foreign.Files)
	if err := works(); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Txn with the new, wrong certificate = %v; want %v", err, store.ErrUnavailable)
	}
	replace(e.Issue("third"))
	eventually(t, "right files work again", works)
	if err := os.WriteFile(files.Key, []byte("half written"), 0o600); err != nil {
		t.Fatal(err)
	}
	e.Members[0].Restart()
	eventually(t, "the last good files work", works)
}

func TestPrefixThatHoldsSomethingElse(t *testing.T) {
	t.Parallel()
	e := stage.StartEtcd(t, 1)
	client := e.Client()
	cfg := config(e)
	if _, err := client.Put(t.Context(), cfg.Prefix+"something", "else"); err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "prefix of its own") {
		t.Errorf("Open = %v; want an error that says what to do", err)
	}
	if err := etcd.Import(t.Context(), cfg, 1, each(nil)); err == nil || !strings.Contains(err.Error(), "another prefix") {
		t.Errorf("Import = %v; want an error that says what to do", err)
	}
	cfg = config(e)
	open(t, cfg).Close()
	raw, err := client.Get(t.Context(), cfg.Prefix+"m/layout")
	if err != nil || len(raw.Kvs) != 1 {
		t.Fatal(raw, err)
	}
	layout := raw.Kvs[0].Value
	if _, err := client.Put(t.Context(), cfg.Prefix+"m/layout", string(layout[:len(layout)-1])); err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("Open of a damaged layout = %v; want an error", err)
	}
	layout[0]++
	if _, err := client.Put(t.Context(), cfg.Prefix+"m/layout", string(layout)); err != nil {
		t.Fatal(err)
	}
	if _, err := etcd.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "format") {
		t.Errorf("Open of an unknown format = %v; want an error", err)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// join writes files one after the other into one.
func join(t testing.TB, files ...string) string {
	t.Helper()
	var all bytes.Buffer
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	path := filepath.Join(t.TempDir(), "joined.pem")
	if err := os.WriteFile(path, all.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Whether a member's refusal of our certificate is read before the connection is
// gone is luck; one attempt that heard it is enough to say so.
func TestReasonOfTLSIsKept(t *testing.T) {
	t.Parallel()
	refused, cut := errors.New("remote error: tls: bad certificate"), errors.New("write tcp 127.0.0.1:1->127.0.0.1:2: write: broken pipe")
	reset, down := errors.New("read: connection reset by peer"), errors.New("dial tcp 127.0.0.1:2: connect: connection refused")
	for name, test := range map[string]struct {
		because []error
		want    error
	}{
		"cut after the refusal":          {[]error{refused, cut, reset}, refused},
		"cut before the refusal":         {[]error{cut, refused}, refused},
		"only cut":                       {[]error{cut, reset}, reset},
		"went down after it had refused": {[]error{refused, down}, down},
		"connected in between":           {[]error{refused, nil, cut}, cut},
	} {
		if got := etcd.Reason(test.because...); !errors.Is(got, test.want) {
			t.Errorf("%s: the reason is %v; want %v", name, got, test.want)
		}
	}
}
