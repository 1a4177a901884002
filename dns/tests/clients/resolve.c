/* Resolves each argument by the C library's resolver: a name to its addresses, an IPv4 address to its name. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

static void say(const char *asked, const struct sockaddr *address, socklen_t length, int flags) {
	char text[NI_MAXHOST];
	int error = getnameinfo(address, length, text, sizeof text, NULL, 0, flags);
	printf("%s %s\n", asked, error ? gai_strerror(error) : text);
}

int main(int count, char **arguments) {
	for (int i = 1; i < count; i++) {
		struct sockaddr_in reverse = {.sin_family = AF_INET};
		struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *one;
		if (inet_pton(AF_INET, arguments[i], &reverse.sin_addr) == 1) {
			say(arguments[i], (struct sockaddr *)&reverse, sizeof reverse, NI_NAMEREQD);
			continue;
		}
		int error = getaddrinfo(arguments[i], NULL, &hints, &found);
		if (error) {
			printf("%s %s\n", arguments[i], gai_strerror(error));
			continue;
		}
		for (one = found; one; one = one->ai_next)
			say(arguments[i], one->ai_addr, one->ai_addrlen, NI_NUMERICHOST);
		freeaddrinfo(found);
	}
	return 0;
}
