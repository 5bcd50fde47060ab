// A relay as Cloud SQL Auth Proxy is one: a goroutine for each direction, crypto/tls towards the server, io.Copy.
// Nothing of Postgres is understood but the request for TLS; the client logs in by itself.
//
//	relay LISTEN SERVER NAME CA.pem
package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"os"
)

var requestForTLS = []byte{0, 0, 0, 8, 4, 210, 22, 47}

func main() {
	listen, server, name, authority := os.Args[1], os.Args[2], os.Args[3], os.Args[4]
	pem, err := os.ReadFile(authority)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		log.Fatalf("no certificate in %s", authority)
	}
	settings := &tls.Config{RootCAs: roots, ServerName: name}
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		log.Fatal(err)
	}
	for {
		client, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer client.Close()
			upstream, err := dial(server, settings)
			if err != nil {
				log.Print(err)
				return
			}
			defer upstream.Close()
			relay(client, upstream)
		}()
	}
}

func dial(server string, settings *tls.Config) (net.Conn, error) {
	plain, err := net.Dial("tcp", server)
	if err != nil {
		return nil, err
	}
	upstream, err := secure(plain, settings)
	if err != nil {
		plain.Close()
	}
	return upstream, err
}

func secure(plain net.Conn, settings *tls.Config) (net.Conn, error) {
	if _, err := plain.Write(requestForTLS); err != nil {
		return nil, err
	}
	answer := make([]byte, 1)
	if _, err := io.ReadFull(plain, answer); err != nil {
		return nil, err
	}
	if answer[0] != 'S' {
		return nil, errors.New("the server speaks no TLS")
	}
	upstream := tls.Client(plain, settings)
	return upstream, upstream.Handshake()
}

// Ends when either side does.
func relay(client, upstream net.Conn) {
	done := make(chan struct{}, 2)
	copyAll := func(to io.Writer, from io.Reader) {
		io.Copy(to, from)
		done <- struct{}{}
	}
	go copyAll(upstream, client)
	go copyAll(client, upstream)
	<-done
}
