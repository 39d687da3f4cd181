// Instance tokens and documents, from a served metadata server.

package attest

import (
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"merlon.dev/ca/capb"
)

// gcpServer answers as Google's metadata server does, with a token that says what
// was asked for.
func gcpServer(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Metadata-Flavor") != "Google" || r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/identity" {
		w.WriteHeader(http.StatusForbidden)
		return
	}
	w.Header().Set("Metadata-Flavor", "Google")
	fmt.Fprintf(w, "token.for.%s.%s", r.URL.Query().Get("audience"), r.URL.Query().Get("format"))
}

func azureServer(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Metadata") != "true" || r.URL.Path != "/metadata/identity/oauth2/token" || r.URL.Query().Get("api-version") == "" {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, `{"access_token":"token.for.%s","expires_in":"86399","token_type":"Bearer"}`, r.URL.Query().Get("resource"))
}

// awsServer answers as Amazon's metadata service does where its first version is
// switched off: to who has a session token, which a PUT gives.
func awsServer(message []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token" && r.Header.Get("X-aws-ec2-metadata-token-ttl-seconds") != "":
			fmt.Fprint(w, "AQAEAs4WBg==")
		case r.Method == http.MethodGet && r.URL.Path == "/latest/dynamic/instance-identity/rsa2048" && r.Header.Get("X-aws-ec2-metadata-token") == "AQAEAs4WBg==":
			text := base64.StdEncoding.EncodeToString(message)
			for len(text) > 64 {
				fmt.Fprintln(w, text[:64])
				text = text[64:]
			}
			fmt.Fprint(w, text)
		default:
			w.WriteHeader(http.StatusUnauthorized)
		}
	}
}

func TestDocumentIsAskedForBySessionToken(t *testing.T) {
	message, _ := signedByOpenSSL(t, identityDocument, openLengths...)
	req := &capb.AttestRequest{}
	if err := (&AWS{Server: serve(t, awsServer(message))}).Evidence(t.Context(), tls.ConnectionState{}, req); err != nil {
		t.Fatal(err)
	}
	d := req.GetAwsDocument()
	if string(d.GetDocument()) != identityDocument || len(d.GetSignedAttributes()) == 0 || len(d.GetSignature()) != 256 {
		t.Errorf("evidence = %v; want the document, its attributes and the signature", d)
	}
}

func TestMetadataServicesThatAnswerNoDocument(t *testing.T) {
	message, _ := signedByOpenSSL(t, identityDocument, openLengths...)
	session := func(token string, then http.HandlerFunc) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPut {
				fmt.Fprint(w, token)
				return
			}
			then(w, r)
		}
	}
	says := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, body) }
	}
	good := awsServer(message)
	for name, tc := range map[string]struct {
		server http.HandlerFunc
		want   string
	}{
		"the first version alone": {func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			fmt.Fprint(w, base64.StdEncoding.EncodeToString(message))
		}, "hop limit"},
		"no session token":         {session("", good), "not Amazon's"},
		"a portal that answers":    {says("<html>\n</html>"), "not Amazon's"},
		"too long a session token": {session(strings.Repeat("x", maxAWSSessionToken+1), good), "not Amazon's"},
		"another's session token":  {session("other", good), "status 401"},
		"no base64":                {session("x", says("<html>")), "no PKCS #7"},
		"no message":               {session("x", says("AAAA")), "no PKCS #7"},
		"too much":                 {session("x", says(strings.Repeat("A", maxMetadataAnswer+1))), "more than"},
		"a redirect for a session": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/x", http.StatusTemporaryRedirect) }, "not followed"},
		"a redirect":               {session("x", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/x", http.StatusFound) }), "not followed"},
	} {
		req := &capb.AttestRequest{}
		err := (&AWS{Server: serve(t, tc.server)}).Evidence(t.Context(), tls.ConnectionState{}, req)
		if err == nil || req.GetEvidence() != nil || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), "document") {
			t.Errorf("%s: evidence %v, %v; want an error with %q", name, req.GetEvidence(), err, tc.want)
		}
	}
}

// A proxy of the environment is for other addresses; the metadata server's means
// another machine there.
func TestMetadataServerIsAskedWithoutProxy(t *testing.T) {
	if transport, ok := metadataClient().Transport.(*http.Transport); !ok || transport.Proxy != nil {
		t.Errorf("the client goes by %v", metadataClient().Transport)
	}
}

func serve(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL
}

func TestInstanceTokenIsAskedForWithTheAudience(t *testing.T) {
	for want, a := range map[string]Attestor{
		"token.for.https://ca.test.full": &GCP{Audience: "https://ca.test", Server: serve(t, gcpServer)},
		"token.for.api://ca.test":        &Azure{Audience: "api://ca.test", Server: serve(t, azureServer)},
	} {
		req := &capb.AttestRequest{}
		if err := a.Evidence(t.Context(), tls.ConnectionState{}, req); err != nil || req.GetGcpToken()+req.GetAzureToken() != want {
			t.Errorf("%s: evidence %v, %v; want %s", a.Kind(), req, err, want)
		}
	}
}

func TestMetadataServersThatAnswerNoToken(t *testing.T) {
	answer := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			fmt.Fprint(w, body)
		}
	}
	google := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
			fmt.Fprint(w, body)
		}
	}
	large := strings.Repeat("x", maxMetadataAnswer+1)
	for name, a := range map[string]Attestor{
		"nobody":                    &GCP{Server: "http://127.0.0.1:1"},
		"an error":                  &GCP{Server: serve(t, answer(404, "no service account"))},
		"a portal that answers all": &GCP{Server: serve(t, answer(200, "<html>"))},
		"too much":                  &GCP{Server: serve(t, google(large))},
		"a redirect":                &GCP{Server: serve(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/x", http.StatusFound) })},
		"Azure: nobody":             &Azure{Server: "http://127.0.0.1:1"},
		"Azure: an error":           &Azure{Server: serve(t, answer(400, `{"error":"invalid_request"}`))},
		"Azure: no JSON":            &Azure{Server: serve(t, answer(200, "x"))},
		"Azure: no token":           &Azure{Server: serve(t, answer(200, "{}"))},
		"Azure: too much":           &Azure{Server: serve(t, answer(200, `{"access_token":"`+large+`"}`))},
	} {
		req := &capb.AttestRequest{}
		if err := a.Evidence(t.Context(), tls.ConnectionState{}, req); err == nil || req.GetEvidence() != nil || !strings.Contains(err.Error(), "token") {
			t.Errorf("%s: evidence %v, %v; want an error that says what was asked for", name, req.GetEvidence(), err)
		}
	}
}
